"""Kernels of BudgetDraft. `reference` holds plain eager twins that every fast path is tested against.

One operation a file; import the one you need, `from bd_kernels.draft_attention import draft_attention`. This package
itself imports neither triton nor torch, and no module of it touches a GPU driver before its first launch.
"""
