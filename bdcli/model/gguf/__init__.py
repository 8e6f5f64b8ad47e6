"""Models in GGUF files: the file, its encodings of weights, its tokenizer, and the model that they make."""
