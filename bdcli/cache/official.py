"""The paper's drafter cache (arXiv 2606.00144): chunks chosen once after prefill, generated tokens never evicted."""

from __future__ import annotations

from bdcli.cache.chunks import official_chunks
from bdcli.cache.full import FullCache
from bdcli.cache.view import CHUNK_KEYS
from bdcli.model.llama import Model


class OfficialCache(FullCache):
    """`budget` bounds what is kept of the prompt only; `peak_entries` is the true count. Keys keep their rotation."""

    copies = False  # chunks are chosen by queries that were not kept

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
        slots = self.kept + self.capacity - tokens
        self._kept_keys = self._zeros(self.layers, self.kv_heads, slots, self.head_dim)
        self._kept_values = self._zeros(self.layers, self.kv_heads, slots, self.head_dim)

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
