"""Speculative decoding: draft, verify, accept; the draft length; the autoregressive baseline."""
