"""Benchmarks: arms run side by side on the same prompts, speed of shapes and kernels, and claims about acceptance."""
