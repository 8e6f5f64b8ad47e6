"""Compiled decoding on x86-64 processors: KV and weights read once a step, at memory speed.

data flows  machine -> tables, products, blocks, amx -> layers, attention, sampling -> forward -> pool -> caches, runner
"""
