"""Every setting of commands and recipes: one typed field with its meaning and bounds. No torch here."""
