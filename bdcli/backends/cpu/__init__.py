"""Compiled decoding on x86-64 processors: KV and weights read once a step, at memory speed.

data flows  simd -> layout, micro -> rows, attention, draws -> threads, step -> pool -> caches, reader
"""
