"""Decoding on a GPU: a round is one pure tensor program over static buffers, captured once as a CUDA graph.

The same program runs on a CPU with plain operations standing in for the kernels, which is how it is tested anywhere.
"""
