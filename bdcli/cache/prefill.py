"""What lives only while a prompt is read from which chunks are chosen: one layer's keys, values and last queries."""

from __future__ import annotations

import torch
from torch import Tensor

from bdcli.cache.chunks import SCORING_QUERIES
from bdcli.cache.view import View
from bdcli.model.rope import RopeTable


class LayerPrompt:
    """Keys and values [T, Hkv, D] of the whole prompt in one layer, and its last queries [m, H, D].

    `keys` are rotated at their positions, `raw_keys` unrotated (the same tensor with absolute positions, where chosen
    keys keep their rotation).
    """

    def __init__(self, view: View, rope: RopeTable, empty: Tensor, heads: int):
        """`empty` [T, Hkv, D] becomes the keys; T is the prompt's length."""
        self.view, self.rope, self.keys = view, rope, empty
        self.raw_keys = torch.empty_like(empty) if view.rebased else empty
        self.values = torch.zeros_like(empty)
        self.last_queries = empty.new_zeros(0, heads, empty.shape[-1])

    def add(self, start: int, k: Tensor, raw_k: Tensor, v: Tensor) -> None:
        """Rows of positions start.. ."""
        rows = slice(start, start + k.shape[0])
        self.keys[rows], self.values[rows] = k, v
        if self.view.rebased:
            self.raw_keys[rows] = raw_k

    def add_queries(self, rotated: Tensor, raw: Tensor) -> None:
        """Keep the last queries as they will look at chosen chunks: all at the last rank, or at their positions."""
        if self.view.rebased:
            rows = slice(self.view.last_rank, self.view.last_rank + 1)
            rotated = self.rope.rotate(raw[-SCORING_QUERIES:], self.rope.rows(rows))
        self.last_queries = torch.cat((self.last_queries, rotated[-SCORING_QUERIES:]))[-SCORING_QUERIES:]

    def forget_queries(self) -> None:
        """The next layer begins."""
        self.last_queries = self.last_queries[:0]

    def seen(self, start: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [Hkv, D, K], values [Hkv, K, D] and positions [K] that some query of start..start+rows-1 may see."""
        first = max(self.view.sinks, start - self.view.window + 1) if self.view.rebased else 0
        positions = torch.cat((torch.arange(min(first, self.view.sinks)), torch.arange(first, start + rows)))
        return self.keys[positions].permute(1, 2, 0), self.values[positions].transpose(0, 1), positions
