"""BudgetDraft: lossless speculative decoding with a drafter inside a fixed KV budget."""

__version__ = "0.1.0"
