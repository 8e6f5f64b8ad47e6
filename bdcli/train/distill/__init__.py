"""Distillation of a drafter under many KV budgets at once."""
