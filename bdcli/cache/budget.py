"""The drafter's KV cache with a hard bound: sinks, chosen chunks, a ring of recents (the law: `bdcli.cache.view`)."""

from __future__ import annotations

import torch
from torch import Tensor

from bdcli.cache.chunks import SCORING_QUERIES, prompt_chunks
from bdcli.cache.full import Cached
from bdcli.cache.view import View
from bdcli.model.llama import Model


class BudgetCache(Cached):
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
        # while a chunk prefill runs: one layer's full keys, rotated and raw, its values, its last queries
        self._layer_keys = self._raw_keys = self._layer_values = self._last_queries = None
        # slot j is seen by query t iff (t - j) mod ring < window: a contiguous slice of one doubled row
        age = -torch.arange(2 * view.ring, device=self.device) % view.ring
        self._steady = torch.zeros(2 * view.ring, dtype=self.dtype, device=self.device)
        self._steady.masked_fill_(age >= view.window, -torch.inf)

    def _allocate(self) -> None:
        shape = (self.layers, self.kv_heads)
        self.keys = self._zeros(*shape, self.head_dim, self.view.budget)  # transposed: scores are a plain GEMM
        self.values = self._zeros(*shape, self.view.budget, self.head_dim)

    # -- prefill

    def begin_prefill(self, tokens: int) -> None:
        super().begin_prefill(tokens)
        if self.view.chosen:
            if tokens < self.view.budget:
                raise RuntimeError("a view with chosen chunks needs a prompt longer than the budget")
            self._layer_keys = self._zeros(tokens, self.kv_heads, self.head_dim)
            self._raw_keys = torch.empty_like(self._layer_keys) if self.view.rebased else self._layer_keys
            self._layer_values = torch.zeros_like(self._layer_keys)
            self._last_queries = self._zeros(0, self.heads, self.head_dim)

    def end_layer(self, layer: int) -> None:
        if self.view.chosen:
            self._choose(layer)

    def end_prefill(self) -> None:
        self.length = self._written = self._prompt
        self._prompt = self._layer_keys = self._layer_values = self._raw_keys = self._last_queries = None

    def _choose(self, layer: int) -> None:
        """Keep sinks, the best chunks between them and the window, and the window itself; drop the layer's rest."""
        view, end = self.view, self._prompt - self.view.window
        self._choose_into(layer)
        self._oldest = end
        self._store(layer, 0, self._layer_keys[: view.sinks], self._layer_values[: view.sinks])
        self._store(layer, end, self._layer_keys[end:], self._layer_values[end:])
        self._last_queries = self._last_queries[:0]

    def _choose_into(self, layer: int) -> None:
        """Put the best chunks between the prompt's sinks and its window behind the sinks."""
        view = self.view
        index = prompt_chunks(self.rope, view, self._last_queries, self._layer_keys, self._raw_keys)
        gather = index.T[..., None].expand(-1, -1, self.head_dim)
        kept = self._raw_keys.gather(0, gather)
        if view.rebased:
            kept = self.rope.rotate(kept, self.rope.rows(slice(view.sinks, view.prefix)))
        chosen = slice(view.sinks, view.prefix)
        self.keys[layer, :, :, chosen] = kept.permute(1, 2, 0)
        self.values[layer, :, chosen] = self._layer_values.gather(0, gather).transpose(0, 1)

    # -- one forward

    def reserve(self, start: int, rows: int) -> None:
        """Refuse rows that the cache has no room for, or whose view a rollback has destroyed."""
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

    def plan(self, start: int, rows: int) -> tuple:
        """(start, rows, RoPE rows at true positions, RoPE rows at ranks or None, additive mask over all B slots)."""
        self.reserve(start, rows)
        at_rank = None
        if self.view.rebased:  # nothing is chosen yet while the prompt is read
            last = self.view.last_rank - (self.view.chosen if self._prompt is not None else 0)
            ranks = slice(last, last + 1) if start >= last else torch.arange(start, start + rows).clamp(max=last)
            at_rank = self.rope.rows(ranks)
        mask = None if self._prompt is not None else self._mask(start, rows)
        return start, rows, self.rope.rows(slice(start, start + rows)), at_rank, mask

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

    def write(self, layer: int, plan: tuple, qk: Tensor, v: Tensor) -> tuple:
        start, rows, at_position, at_rank, _ = plan
        rotated = self.rope.rotate(qk, at_position)
        q, k = rotated[:, : self.heads], rotated[:, self.heads :]
        q_rank = q if at_rank is None else self.rope.rotate(qk[:, : self.heads], at_rank)
        if self._prompt is None:
            self._store(layer, start, k, v)
            return q, q_rank, None
        past = None
        if self.view.chosen:
            self._layer_keys[start : start + rows], self._layer_values[start : start + rows] = k, v
            if self.view.rebased:
                self._raw_keys[start : start + rows] = qk[:, self.heads :]
            self._keep_last_queries(q, qk[:, : self.heads])
        else:
            past = self._recent(layer, start, k, v)
            self._store(layer, start, k, v)
        return q, q_rank, past

    def _keep_last_queries(self, rotated: Tensor, raw: Tensor) -> None:
        """The last queries seen, as they will look at chosen chunks: all at the last rank, or at their positions."""
        if self.view.rebased:
            rows = slice(self.view.last_rank, self.view.last_rank + 1)
            rotated = self.rope.rotate(raw[-SCORING_QUERIES:], self.rope.rows(rows))
        self._last_queries = torch.cat((self._last_queries, rotated[-SCORING_QUERIES:]))[-SCORING_QUERIES:]

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
            slots = torch.where(positions < view.sinks, positions, view.prefix + positions % view.ring)
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

    def read(self, layer: int, plan: tuple, q: tuple) -> Tensor:
        start, rows, _, _, mask = plan
        q_true, q_rank, past = q
        if self._prompt is None:
            return self._weigh(q_true, q_rank, self.keys[layer], self.values[layer], self.view.prefix, mask)
        if past is None:
            first = 0
            if self.view.rebased:
                first = max(self.view.sinks, start - self.view.window + 1)
            stop = start + rows
            positions = torch.cat((torch.arange(min(first, self.view.sinks)), torch.arange(first, stop)))
            keys = self._layer_keys[positions].permute(1, 2, 0)
            past = keys, self._layer_values[positions].transpose(0, 1), positions
        keys, values, positions = past
        queries = torch.arange(start, start + rows)
        if self.view.rebased or not self.view.chosen:
            seen = self.view.allowed(queries, positions)
        else:  # absolute chunk: the prompt reads itself in full
            seen = positions[None] <= queries[:, None]
        mask = torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, -torch.inf).to(self.device)
        sinks = int((positions < self.view.sinks).sum())
        return self._weigh(q_true, q_rank, keys, values, sinks, mask)

    def _weigh(self, q: Tensor, q_rank: Tensor, k: Tensor, v: Tensor, prefix: int, mask: Tensor) -> Tensor:
        """One softmax over prefix keys (query at its rank) and the rest (query at its position).

        q and q_rank [T, H, D], k [Hkv, D, K], v [Hkv, K, D], mask [T, K] or [T, K - prefix]; returns [T, H·D].
        """
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
