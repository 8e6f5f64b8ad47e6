"""Llama-family models: configuration, layers, positions, checkpoints, tokenizers and text."""
