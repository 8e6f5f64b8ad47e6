"""Text in: named sources, splits, synthetic texts, token streams, prompts and samples."""
