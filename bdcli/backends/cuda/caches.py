"""KV caches whose positions are tensors on the device, so that one captured program serves every length.

They prefill as the caches of `bdcli.cache.full` and `bdcli.cache.budget` do. Afterwards `place` turns the position of
the first row, a tensor, into what all layers share, and `attend` stores the rows' entries and looks at the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdcli.backends.cuda.ops import ops_for
from bdcli.cache.budget import BudgetCache
from bdcli.cache.chunks import choose_chunks
from bdcli.cache.full import FullCache
from bdcli.cache.official import OfficialCache
from bdcli.cache.selection import CacheKinds
from bdcli.cache.view import CHUNK_KEYS


class _Rows:
    """Decoding over entries that stand at their position less `shift`."""

    def place(self, start: Tensor, rows: int) -> tuple:
        """start [1]: position of the first of `rows` rows."""
        positions = start + torch.arange(rows, device=start.device)
        return positions, positions - self.shift, start - self.shift

    def attend(self, layer: int, place: tuple, qk: Tensor, v: Tensor) -> Tensor:
        """Attention output [T, H·D] of rows qk [T, H+Hkv, D], unrotated, and v [T, Hkv, D]."""
        positions, slots, length = place
        ops, keys, values = ops_for(qk.device.type), self.keys[layer], self.values[layer]
        q = ops.rotate_store(qk, v, keys, values, positions, slots, (self.rope.cos[:, 0], self.rope.sin[:, 0]), True)
        return ops.verify_attention(q[None], keys[None], values[None], length)[0].flatten(1)


class StaticFullCache(_Rows, FullCache):
    """Every key and value of the sequence."""

    copies = False  # a captured program would not see what is copied between its steps


class StaticOfficialCache(_Rows, OfficialCache):
    """The paper's drafter cache; `shift` is fixed once its chunks are chosen."""


class StaticBudgetCache(BudgetCache):
    """The drafter's budgeted cache with D contiguous, [layers, Hkv, B, D], as the draft kernel reads it."""

    copies = False

    def _allocate(self) -> None:
        shape = (self.layers, self.kv_heads, self.view.budget, self.head_dim)
        self.rows, self.values = self._zeros(*shape), self._zeros(*shape)
        self.keys = self.rows.transpose(2, 3)  # as prefill sees them

    def _choose_into(self, layer: int) -> None:
        """As `BudgetCache` has it, in kernels, which need no copy of the prompt's keys in fp32."""
        view, keys, cos, sin = self.view, self._layer.raw_keys, self.rope.cos[:, 0], self.rope.sin[:, 0]
        ops = ops_for(keys.device.type)
        end = self._prompt - view.window
        first = view.sinks + (end - view.sinks) % CHUNK_KEYS
        rank = view.sinks + (view.chosen - CHUNK_KEYS) // 2
        scored, kept = (
            (slice(rank, rank + CHUNK_KEYS), slice(view.sinks, view.prefix)) if view.rebased else (None, None)
        )
        ropes = [None if rows is None else (cos[rows], sin[rows]) for rows in (scored, kept)]
        scores = ops.chunk_scores(self._layer.last_queries, keys[first:end], CHUNK_KEYS, rope=ropes[0])
        index = choose_chunks(scores, view.chosen // CHUNK_KEYS, CHUNK_KEYS) + first
        chosen = slice(view.sinks, view.prefix)
        into = self.rows[layer][:, chosen], self.values[layer][:, chosen]
        ops.compact(keys, self._layer.values, index.int(), *into, rope=ropes[1])

    def place(self, start: Tensor, rows: int) -> tuple:
        """start [1]: position of the first of `rows` rows, at most γmax + 2 of them."""
        view, positions = self.view, start + torch.arange(rows, device=start.device)
        slots = torch.where(positions < view.sinks, positions, view.prefix + positions % view.ring)
        return positions, slots, start

    def attend(self, layer: int, place: tuple, qk: Tensor, v: Tensor) -> Tensor:
        """Attention output [T, H·D] of rows qk [T, H+Hkv, D], unrotated, and v [T, Hkv, D]."""
        positions, slots, start = place
        view, keys, values = self.view, self.rows[layer], self.values[layer]
        ops, rope = ops_for(qk.device.type), (self.rope.cos[:, 0], self.rope.sin[:, 0])
        q = ops.rotate_store(qk, v, keys, values, positions, slots, rope, not view.rebased)
        out = ops.draft_attention(
            q[None],
            keys[None],
            values[None],
            start,
            view.sinks,
            view.chosen,
            view.window,
            view.ring,
            rope=rope if view.rebased else None,  # then the kernel rotates a query to its position and to its rank
        )
        return out[0].flatten(1)


STATIC_CACHES = CacheKinds(StaticFullCache, StaticOfficialCache, StaticBudgetCache)
