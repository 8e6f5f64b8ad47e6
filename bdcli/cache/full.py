"""Static KV caches that keep what they are given: `FullCache` for the target, `OfficialCache` as the paper's drafter.

All are preallocated; rollback sets an integer. A cache holds rotated keys, so it owns the RoPE tables, and it
computes attention because only it knows what a query may see. Batch is 1; shapes as in `bdcli.model.llama.Cache`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bdcli.base.devices import product_dtype
from bdcli.cache.chunks import official_chunks
from bdcli.cache.view import CHUNK_KEYS
from bdcli.model.llama import PREFILL_BLOCK, Model
from bdcli.model.rope import RopeTable


class Cached:
    """What all caches share: geometry, RoPE table, length, and splitting qk into rotated q and k."""

    reads_whole_prompt = False

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

    def _zeros(self, *shape: int) -> Tensor:
        # zeros, not empty: a masked slot must not hold a NaN, because 0 · NaN is NaN
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)

    @property
    def kv_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def begin_prefill(self, tokens: int) -> None:
        if self.length:
            raise RuntimeError("prefill needs an empty cache")
        self._prompt = tokens

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


class FullCache(Cached):
    """Every key and value of the sequence. Entries sit at their position; `capacity` bounds prompt + new + draft."""

    max_rows = PREFILL_BLOCK
    reads_whole_prompt = True

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
        """Refuse rows that the cache has no room for."""
        stop = start + rows - self.shift
        if stop > self.slots:
            raise RuntimeError(f"cache of {self.slots} entries cannot hold {stop}")

    def record(self, stop: int) -> None:
        """Entries held once everything before position `stop` has been stored."""
        self.peak_entries = max(self.peak_entries, stop - self.shift)

    def plan(self, start: int, rows: int) -> tuple:
        """Slots, RoPE rows and additive mask for positions start..start+rows-1, shared by all layers."""
        self.reserve(start, rows)
        self.record(start + rows)
        stop = start + rows - self.shift
        mask = None
        if rows > 1 and self._prompt is None:
            mask = self._zeros(rows, stop)
            mask[:, stop - rows :] = self._triangle[:rows, :rows]
        return slice(stop - rows, stop), stop, self.rope.rows(slice(start, start + rows)), mask

    def write(self, layer: int, plan: tuple, qk: Tensor, v: Tensor) -> Tensor:
        slots, _, rope_rows, _ = plan
        qk = self.rope.rotate(qk, rope_rows)
        self.keys[layer, :, slots] = qk[:, self.heads :].transpose(0, 1)
        self.values[layer, :, slots] = v.transpose(0, 1)
        return qk[:, : self.heads]

    def read(self, layer: int, plan: tuple, q: Tensor) -> Tensor:
        _, stop, _, mask = plan
        return self._attend(q, self.keys[layer, :, :stop], self.values[layer, :, :stop], mask)

    def read_prompt(self, layer: int, q: Tensor) -> Tensor:
        """Causal attention [T, H·D] of all prompt queries q [T, H, D] at once.

        A bf16 cache takes fp32 where that multiplies faster, a KV head a thread, so that little is wide at once.
        """
        kind = product_dtype(self.device.type) if self.dtype is torch.bfloat16 else self.dtype
        some, group = self.kv_heads if kind is self.dtype else torch.get_num_threads(), self.heads // self.kv_heads
        out = q.new_empty(q.shape)
        for first in range(0, self.kv_heads, some):
            asking = slice(first * group, (first + some) * group)  # fewer in the last turn
            kept = (x[layer, first : first + some, : q.shape[0]] for x in (self.keys, self.values))
            wide = (x[None].to(kind) for x in (q[:, asking].transpose(0, 1), *kept))
            read = F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=group > 1)[0]
            out[:, asking] = read.transpose(0, 1)
        return out.flatten(1)

    def save(self, start: int) -> tuple[int, Tensor, Tensor]:
        """Copy of the entries from position `start` on; `restore` puts them back."""
        slots = slice(start - self.shift, self.length - self.shift)
        return start, self.keys[:, :, slots].clone(), self.values[:, :, slots].clone()

    def restore(self, saved: tuple[int, Tensor, Tensor]) -> None:
        start, keys, values = saved
        slots = slice(start - self.shift, start - self.shift + keys.shape[2])
        self.keys[:, :, slots], self.values[:, :, slots] = keys, values
        self.length = start + keys.shape[2]


class OfficialCache(FullCache):
    """The paper's drafter cache: chunks chosen once after prefill, generated tokens appended and never evicted.

    `budget` is therefore no bound; `peak_entries` tells the true count. Keys keep their true rotation.
    """

    def __init__(self, model: Model, capacity: int, budget: int, total_length: int | None = None):
        self.budget = budget
        super().__init__(model, capacity, total_length)

    def _allocate(self, slots: int) -> None:
        """Nothing yet: how much is kept is known when the prompt is."""

    def begin_prefill(self, tokens: int) -> None:
        super().begin_prefill(tokens)
        self.kept = min(self.budget, tokens) // CHUNK_KEYS * CHUNK_KEYS
        # one layer's full keys live at a time; `keys[layer]` is resolved by write and read through _layer
        self.keys = self._zeros(1, self.kv_heads, tokens, self.head_dim).expand(self.layers, -1, -1, -1)
        self.values = self._zeros(1, self.kv_heads, tokens, self.head_dim).expand(self.layers, -1, -1, -1)
        room = self.kept + self.capacity - tokens
        self._kept_keys = self._zeros(self.layers, self.kv_heads, room, self.head_dim)
        self._kept_values = self._zeros(self.layers, self.kv_heads, room, self.head_dim)

    def end_layer(self, layer: int) -> None:
        if not self.kept:
            return
        index = official_chunks(self.keys[layer].transpose(0, 1), self.budget, CHUNK_KEYS)[..., None]
        index = index.expand(-1, -1, self.head_dim)
        self._kept_keys[layer, :, : self.kept] = self.keys[layer].gather(1, index)
        self._kept_values[layer, :, : self.kept] = self.values[layer].gather(1, index)

    def end_prefill(self) -> None:
        self.keys, self.values = self._kept_keys, self._kept_values
        del self._kept_keys, self._kept_values
        self.length, self.peak_entries = self._prompt, self.kept
        self.shift, self._prompt = self._prompt - self.kept, None
