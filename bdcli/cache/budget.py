"""The drafter's KV cache with a hard bound: sinks, chosen chunks and a ring of recent keys (`bdcli.cache.view`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bdcli.cache.base import BaseCache
from bdcli.cache.chunks import prompt_chunks
from bdcli.cache.full import FullCache
from bdcli.cache.prefill import LayerPrompt
from bdcli.cache.view import View
from bdcli.model.llama import Model


class BudgetBlock(NamedTuple):
    """Where a block of rows goes: position of the first, RoPE rows at true positions and at ranks, additive mask.

    `at_rank` is None with absolute positions; `mask` [T, K] is None while the prompt is read.
    """

    start: int
    rows: int
    at_position: tuple[Tensor, Tensor]
    at_rank: tuple[Tensor, Tensor] | None
    mask: Tensor | None


class BudgetQueries(NamedTuple):
    """Rotated queries [T, H, D]: at true positions for recent keys, at ranks for the prefix.

    past: while a prompt is read into the ring, keys [Hkv, D, K], values [Hkv, K, D] and positions [K] of what they see.
    """

    at_position: Tensor
    at_rank: Tensor
    past: tuple[Tensor, Tensor, Tensor] | None


class BudgetCache(BaseCache):
    """At most `budget` entries per layer and KV head: sinks | chosen chunks | ring of recents and draft tail.

    The ring holds position p in slot p mod ring; nothing is moved or re-rotated, and a mask decides by position what
    each query sees, so the view never depends on the phase of the round. With `rebased` positions sinks and chosen
    chunks are rotated at their ranks and recents at their true positions; a query is rotated once for each.
    """

    def __init__(self, model: Model, capacity: int, view: View, total_length: int | None = None):
        super().__init__(model, capacity, total_length or capacity)
        self.view, self.capacity = view, capacity
        self.max_rows = view.gamma_max + 2  # as many as the ring takes without touching a key still in view
        self._allocate()
        self._oldest = view.sinks  # position of the first ring entry ever stored
        self._written = 0  # one past the highest position ever stored; a rollback may not reach below its window
        self._layer: LayerPrompt | None = None  # while a prompt is read from which chunks are chosen
        # slot j is seen by query t iff (t - j) mod ring < window: a contiguous slice of one doubled row
        age = -torch.arange(2 * view.ring, device=self.device) % view.ring
        self._steady = torch.zeros(2 * view.ring, dtype=self.dtype, device=self.device)
        self._steady.masked_fill_(age >= view.window, -torch.inf)

    def _allocate(self) -> None:
        shape = (self.layers, self.kv_heads)
        self.keys = self._zeros(*shape, self.head_dim, self.view.budget)  # transposed: scores are a plain GEMM
        self.values = self._zeros(*shape, self.view.budget, self.head_dim)

    @property
    def copies(self) -> bool:
        """Chunks are chosen by queries that a full cache has not kept."""
        return not self.view.chosen

    def copy_from(self, source: FullCache, length: int) -> None:
        """As `FullCache.copy_from`, of what the view after `length` tokens sees.

        Places of copied keys are those of the view: ranks of sinks are their positions, and recents keep theirs.
        """
        sinks, start = self.view.sinks, length - self.view.window
        if not self._copied:
            self._oldest = max(sinks, start)
        positions = torch.arange(self._copied, length, device=self.device)
        positions = positions[(positions < sinks) | (positions >= start)]
        if len(positions):
            self._put(self._places(positions, self.ring_at), *source.entries(positions))
        self.length = self._copied = length
        self.record(length)

    @property
    def ring_at(self) -> int:
        """First slot of the ring once the prompt is read."""
        return self.view.prefix

    def _places(self, positions: Tensor, ring_at: int) -> Tensor:
        """Slots of positions: sinks in front, the others in the ring."""
        return torch.where(positions < self.view.sinks, positions, ring_at + positions % self.view.ring)

    def _put(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        self.keys[:, :, :, slots], self.values[:, :, slots] = keys.transpose(2, 3), values

    # -- prefill

    def begin_prefill(self, tokens: int) -> None:
        super().begin_prefill(tokens)
        if self.view.chosen:
            if tokens - self.view.window - self.view.sinks < self.view.chosen:
                raise RuntimeError("between its sinks and its window the prompt has fewer chunks than are chosen")
            empty = self._zeros(tokens, self.kv_heads, self.head_dim)
            self._layer = LayerPrompt(self.view, self.rope, empty, self.heads)

    def prompt_needs(self, layer: int) -> tuple[int, int]:
        if self.view.chosen:
            return 0, 0
        return self.view.sinks, max(0, self._prompt - self.view.reach(self.layers - 1 - layer))

    def end_layer(self, layer: int) -> None:
        if self.view.chosen:
            self._choose(layer)

    def end_prefill(self) -> None:
        self.length = self._written = self._prompt
        self._prompt = self._layer = None

    def _choose(self, layer: int) -> None:
        """Keep sinks, the best chunks between them and the window, and the window itself; drop the layer's rest."""
        sinks, end, prompt = self.view.sinks, self._prompt - self.view.window, self._layer
        self._choose_into(layer)
        self._oldest = end
        self._store(layer, 0, prompt.keys[:sinks], prompt.values[:sinks])
        self._store(layer, end, prompt.keys[end:], prompt.values[end:])
        prompt.forget_queries()

    def _choose_into(self, layer: int) -> None:
        """Put the best chunks between the prompt's sinks and its window behind the sinks."""
        view, prompt = self.view, self._layer
        index = prompt_chunks(self.rope, view, prompt.last_queries, prompt.keys, prompt.raw_keys)
        gather = index.T[..., None].expand(-1, -1, self.head_dim)
        kept = prompt.raw_keys.gather(0, gather)
        if view.rebased:
            kept = self.rope.rotate(kept, self.rope.rows(slice(view.sinks, view.prefix)))
        chosen = slice(view.sinks, view.prefix)
        self.keys[layer, :, :, chosen] = kept.permute(1, 2, 0)
        self.values[layer, :, chosen] = prompt.values.gather(0, gather).transpose(0, 1)

    # -- one forward

    def reserve(self, start: int, rows: int) -> None:
        """Refuse rows beyond the capacity, or whose view a rollback has destroyed."""
        if start + rows > self.capacity:
            raise RuntimeError(f"positions up to {start + rows} exceed the {self.capacity} planned")
        if self._written - start > self.view.gamma_max + 1 and self._prompt is None:
            raise RuntimeError("rolled back further than the draft tail allows")

    def record(self, stop: int) -> None:
        """Entries held once everything before position `stop` has been stored."""
        ring = min(max(stop - self._oldest, 0), self.view.ring)
        self.peak_entries = max(self.peak_entries, min(stop, self.view.sinks) + self.view.chosen + ring)
        if self._prompt is None:
            self._written = max(self._written, stop)

    def plan(self, start: int, rows: int) -> BudgetBlock:
        """What all layers share for positions start..start+rows-1."""
        self.reserve(start, rows)
        at_rank = None
        if self.view.rebased:  # nothing is chosen yet while the prompt is read
            last = self.view.last_rank - (self.view.chosen if self._prompt is not None else 0)
            ranks = slice(last, last + 1) if start >= last else torch.arange(start, start + rows).clamp(max=last)
            at_rank = self.rope.rows(ranks)
        mask = None if self._prompt is not None else self._mask(start, rows)
        return BudgetBlock(start, rows, self.rope.rows(slice(start, start + rows)), at_rank, mask)

    def _mask(self, start: int, rows: int) -> Tensor:
        """Additive [T, ring] for the ring alone once all in front of it is seen, else [T, B] (nothing chosen yet)."""
        view = self.view
        if start >= view.sinks + view.window:
            offsets = [-(start + i) % view.ring for i in range(rows)]
            if rows == 1:
                return self._steady[None, offsets[0] : offsets[0] + view.ring]
            return torch.stack([self._steady[o : o + view.ring] for o in offsets])
        newest = start + rows - 1
        slots = torch.arange(view.ring)
        held = newest - (newest - slots) % view.ring
        held[held < view.sinks] = -1  # sinks are not stored twice
        seen = view.allowed(torch.arange(start, start + rows), torch.cat((torch.arange(view.sinks), held)))
        return torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, -torch.inf).to(self.device)

    def write(self, layer: int, plan: BudgetBlock, qk: Tensor, v: Tensor) -> BudgetQueries:
        rotated = self.rope.rotate(qk, plan.at_position)
        (q, k), (raw_q, raw_k) = (x.split((self.heads, self.kv_heads), 1) for x in (rotated, qk))
        q_rank = q if plan.at_rank is None else self.rope.rotate(raw_q, plan.at_rank)
        past = None
        if self._layer is not None:
            self._layer.add(plan.start, k, raw_k, v)
            self._layer.add_queries(q, raw_q)
        elif self._prompt is not None:
            past = self._recent(layer, plan.start, k, v)
            self._store(layer, plan.start, k, v)
        else:
            self._store(layer, plan.start, k, v)
        return BudgetQueries(q, q_rank, past)

    def _store(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Put keys and values [T, Hkv, D] of positions start.. where they belong: sink slots, then the ring."""
        view, stop = self.view, start + k.shape[0]
        if k.shape[0] == 1 and start >= view.sinks:
            slot = view.prefix + start % view.ring
            self.keys[layer, :, :, slot], self.values[layer, :, slot] = k[0], v[0]
        else:
            positions = torch.arange(start, stop, device=self.device)
            keep = (positions < view.sinks) | (positions >= stop - view.ring)
            positions, k, v = positions[keep], k[keep], v[keep]
            slots = self._places(positions, view.prefix)
            self.keys[layer][:, :, slots] = k.permute(1, 2, 0)
            self.values[layer][:, slots] = v.transpose(0, 1)
        self.record(stop)

    def _recent(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prefill block: keys [Hkv, D, K], values [Hkv, K, D] and positions [K] of sinks, earlier window and block."""
        view = self.view
        first = max(view.sinks, start - view.window + 1)
        before = torch.cat((torch.arange(min(start, view.sinks)), torch.arange(first, max(first, start))))
        slots = torch.where(before < view.sinks, before, view.prefix + before % view.ring).to(self.device)
        positions = torch.cat((before, torch.arange(start, start + k.shape[0])))
        keys = torch.cat((self.keys[layer][:, :, slots], k.permute(1, 2, 0)), 2)
        return keys, torch.cat((self.values[layer][:, slots], v.transpose(0, 1)), 1), positions

    def read(self, layer: int, plan: BudgetBlock, q: BudgetQueries) -> Tensor:
        if self._prompt is None:
            return self._weigh(q, self.keys[layer], self.values[layer], self.view.prefix, plan.mask)
        keys, values, positions = q.past if self._layer is None else self._layer.seen(plan.start, plan.rows)
        allowed = self.view.reading().allowed(torch.arange(plan.start, plan.start + plan.rows), positions)
        mask = torch.zeros(allowed.shape, dtype=self.dtype).masked_fill_(~allowed, -torch.inf).to(self.device)
        return self._weigh(q, keys, values, int((positions < self.view.sinks).sum()), mask)

    def _weigh(self, queries: BudgetQueries, k: Tensor, v: Tensor, prefix: int, mask: Tensor) -> Tensor:
        """One softmax over prefix keys (query at its rank) and the rest (query at its position).

        k [Hkv, D, K], v [Hkv, K, D], mask [T, K] or [T, K - prefix]; returns [T, H·D].
        """
        q, q_rank, _ = queries
        rows, group, dim = q.shape[0], self.heads // self.kv_heads, self.head_dim

        def fold(x: Tensor) -> Tensor:
            return x.reshape(rows, self.kv_heads, group, dim).transpose(0, 1).reshape(self.kv_heads, -1, dim)

        if q is q_rank:
            scores = torch.bmm(fold(q), k)
        else:
            scores = torch.cat((torch.bmm(fold(q_rank), k[:, :, :prefix]), torch.bmm(fold(q), k[:, :, prefix:])), 2)
        scores = scores.mul_(self.scale).view(self.kv_heads, rows, group, -1)
        scores[..., scores.shape[-1] - mask.shape[1] :].add_(mask[:, None])
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype).view(self.kv_heads, rows * group, -1)
        return torch.bmm(weights, v).view(self.kv_heads, rows, group, dim).transpose(0, 1).reshape(rows, -1)
