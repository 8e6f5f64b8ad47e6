"""Measuring: arms run side by side on the same prompts, gates that refuse what cannot be trusted, cells of figures."""
