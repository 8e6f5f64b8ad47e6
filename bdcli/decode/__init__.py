"""One decode run: models and settings resolved once, text and figures out."""
