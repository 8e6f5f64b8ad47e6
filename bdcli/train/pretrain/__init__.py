"""Pretraining of a small model, from random weights or from a checkpoint."""
