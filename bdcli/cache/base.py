"""What all KV caches share: geometry, RoPE table, length, and attention over grouped heads.

Caches are preallocated and rollback sets an integer. A cache holds rotated keys, so it owns the RoPE table, and it
computes attention because only it knows what a query may see. Batch is 1; shapes as in `bdcli.model.llama.Cache`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bdcli.model.llama import Model, RowOperations
from bdcli.model.rope import RopeTable


class BaseCache:
    """A cache that holds nothing yet. `length` counts the tokens read, `peak_entries` the most entries ever held."""

    reads_whole_prompt = False
    copies = False  # whether `copy_from` can take entries of a full cache of the same model
    row_operations = RowOperations

    def __init__(self, model: Model, positions: int, total_length: int):
        c = model.config
        self.layers, self.heads, self.kv_heads, self.head_dim = c.layers, c.heads, c.kv_heads, c.head_dim
        self.dtype, self.device = model.dtype, model.device
        self.scale = c.head_dim**-0.5
        self.total_length = total_length
        self.rope = RopeTable(c.rope, positions, total_length, self.dtype, self.device)
        self.length = 0
        self.peak_entries = 0
        self._prompt: int | None = None  # tokens of the prompt while it is read
        self._copied = 0  # tokens whose entries came from another cache

    def _zeros(self, *shape: int) -> Tensor:
        # zeros, not empty: a masked slot must not hold a NaN, because 0 · NaN is NaN
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)

    @property
    def storage(self) -> tuple[Tensor, Tensor]:
        """The tensors that hold keys and values."""
        return self.keys, self.values

    @property
    def kv_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.storage)

    def begin_prefill(self, tokens: int) -> None:
        if self.length:
            raise RuntimeError("prefill needs an empty cache")
        self._prompt = tokens

    def prompt_needs(self, layer: int) -> tuple[int, int]:  # noqa: ARG002
        """How many first tokens of the prompt `layer` has to read, and from which position on all of them."""
        return 0, 0

    def end_layer(self, layer: int) -> None:
        """Called when `layer` has seen the whole prompt."""

    def end_prefill(self) -> None:
        """Called when all layers have."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q [T, H, D], k and v [Hkv, K, D], mask [T, K] additive; returns [T, H·D].

        The group's query heads share one row block, so that KV is read once per KV head.
        """
        rows, group = q.shape[0], self.heads // self.kv_heads
        q = q.view(rows, self.kv_heads, group, self.head_dim).permute(1, 2, 0, 3)
        q = q.reshape(self.kv_heads, group * rows, self.head_dim)
        if mask is not None and group > 1:
            mask = mask.expand(group, *mask.shape).reshape(group * rows, -1)
        lonely = q.shape[1] == 1 and q.device.type == "cpu" and q.dtype is torch.bfloat16
        if lonely:  # torch's CPU kernel is about 4x slower for one bf16 query than for two
            q = q.expand(-1, 2, -1)
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=self.scale)[0]
        if lonely:
            out = out[:, :1]
        return out.view(self.kv_heads, group, rows, self.head_dim).permute(2, 0, 1, 3).reshape(rows, -1)
