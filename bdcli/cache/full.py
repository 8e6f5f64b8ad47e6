"""The cache that keeps every key and value: the target's, and a drafter's without a budget."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bdcli.cache.base import BaseCache
from bdcli.cache.causal import causal_attention
from bdcli.model.llama import PREFILL_BLOCK, Model


class FullBlock(NamedTuple):
    """Where a block of rows goes: slots of the cache, RoPE rows, additive mask [T, K] (None: nothing is masked)."""

    slots: slice
    rope_rows: tuple[Tensor, Tensor]
    mask: Tensor | None


class FullCache(BaseCache):
    """Every key and value of the sequence. Entries sit at their position; `capacity` bounds prompt + new + draft."""

    max_rows = PREFILL_BLOCK
    reads_whole_prompt = True
    copies = True
    causal_attention = staticmethod(causal_attention)  # of a backend

    def __init__(self, model: Model, capacity: int, total_length: int | None = None):
        super().__init__(model, capacity, total_length or capacity)
        self.capacity = capacity
        self.shift = 0  # slot of position p is p - shift
        self._allocate(capacity)
        self._triangle = self._zeros(PREFILL_BLOCK, PREFILL_BLOCK).fill_(-torch.inf).triu_(1)

    def _allocate(self, slots: int) -> None:
        self.keys = self._zeros(self.layers, self.kv_heads, slots, self.head_dim)
        self.values = self._zeros(self.layers, self.kv_heads, slots, self.head_dim)

    def end_prefill(self) -> None:
        self.length = self.peak_entries = self._prompt
        self._prompt = None

    @property
    def slots(self) -> int:
        return self.keys.shape[2]

    def reserve(self, start: int, rows: int) -> None:
        """Refuse rows beyond the capacity."""
        stop = start + rows - self.shift
        if stop > self.slots:
            raise RuntimeError(f"cache of {self.slots} entries cannot hold {stop}")

    def record(self, stop: int) -> None:
        """Entries held once everything before position `stop` has been stored."""
        self.peak_entries = max(self.peak_entries, stop - self.shift)

    def plan(self, start: int, rows: int) -> FullBlock:
        """What all layers share for positions start..start+rows-1."""
        self.reserve(start, rows)
        self.record(start + rows)
        stop = start + rows - self.shift
        mask = None
        if rows > 1 and self._prompt is None:
            mask = self._zeros(rows, stop)
            mask[:, stop - rows :] = self._triangle[:rows, :rows]
        return FullBlock(slice(stop - rows, stop), self.rope.rows(slice(start, start + rows)), mask)

    def write(self, layer: int, plan: FullBlock, qk: Tensor, v: Tensor) -> Tensor:
        qk = self.rope.rotate(qk, plan.rope_rows)
        self.keys[layer, :, plan.slots] = qk[:, self.heads :].transpose(0, 1)
        self.values[layer, :, plan.slots] = v.transpose(0, 1)
        return qk[:, : self.heads]

    def read(self, layer: int, plan: FullBlock, q: Tensor) -> Tensor:
        stop = plan.slots.stop
        return self._attend(q, self.keys[layer, :, :stop], self.values[layer, :, :stop], plan.mask)

    def read_prompt(self, layer: int, q: Tensor) -> Tensor:
        """Causal attention [T, H·D] of all prompt queries q [T, H, D] at once."""
        keys, values = (x[layer, :, : q.shape[0]] for x in (self.keys, self.values))
        return self.causal_attention(q, keys, values, self.scale).flatten(1)

    def entries(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [layers, Hkv, n, D] of n positions."""
        slots = positions - self.shift
        return self.keys[:, :, slots], self.values[:, :, slots]

    def copy_from(self, source: FullCache, length: int) -> None:
        """Hold the `length` tokens that `source` holds, a cache of the same model; what is held already stays."""
        positions = torch.arange(self._copied, length, device=self.device)
        if len(positions):
            self._put(positions - self.shift, *source.entries(positions))
        self.length = self._copied = length
        self.record(length)

    def _put(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        self.keys[:, :, slots], self.values[:, :, slots] = keys, values

    def save(self, start: int) -> tuple[int, Tensor, Tensor]:
        """Copy of the entries from position `start` on; `restore` puts them back."""
        slots = slice(start - self.shift, self.length - self.shift)
        return start, self.keys[:, :, slots].clone(), self.values[:, :, slots].clone()

    def restore(self, saved: tuple[int, Tensor, Tensor]) -> None:
        start, keys, values = saved
        slots = slice(start - self.shift, start - self.shift + keys.shape[2])
        self.keys[:, :, slots], self.values[:, :, slots] = keys, values
        self.length = start + keys.shape[2]
