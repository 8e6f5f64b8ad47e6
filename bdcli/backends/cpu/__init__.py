"""Compiled decoding on x86-64 processors: KV and weights read once a step, at memory speed.

data flows  simd -> tables, products, amx -> layers, attention, sampling -> threads, forward -> pool -> caches, runner
"""
