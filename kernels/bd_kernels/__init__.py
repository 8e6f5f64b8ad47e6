"""Kernels of BudgetDraft. `reference` is the law: plain eager twins that every fast path is tested against."""
