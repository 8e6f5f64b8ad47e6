"""Training a drafter: text, views with gradients, acceptance losses, steps that survive, and the runs made of them."""
