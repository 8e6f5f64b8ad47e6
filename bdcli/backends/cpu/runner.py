"""A reader whose steps are compiled: the same interface as `speculate.Reader`, one call into machine code a forward.

Prefill stays torch's, whose GEMMs are fast; decoding and drafting read the model's own weights in place.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Tensor

from bdcli.backends.cpu import amx as tiles
from bdcli.backends.cpu import tables as of
from bdcli.backends.cpu.autotune import tiled
from bdcli.backends.cpu.caches import PanelBudgetCache, PanelFullCache, PanelOfficialCache
from bdcli.backends.cpu.huge_pages import give_back, huge_zeros
from bdcli.backends.cpu.pool import pool
from bdcli.backends.cpu.products import DOTS, FLOATS, PAIRS
from bdcli.backends.cpu.support import dots_pay
from bdcli.model.config import RopeConfig
from bdcli.model.llama import Layer, Model
from bdcli.model.rope import RopeTable
from bdcli.speculation.sampling import Sampling, non_finite
from bdcli.speculation.speculator import Reader

MUCH = 1024  # tokens of a prompt that leave something to give back
VERIFY_ROWS = 9  # read at once where products are chosen, beside one row
VECTORS = {  # fields of a layer that are few numbers and kept as floats
    of.ATTENTION_NORM: "attention_norm",
    of.QKV_BIAS: "qkv_bias",
    of.QK_NORM: "qk_norm",
    of.OUT_BIAS: "out_bias",
    of.MLP_NORM: "mlp_norm",
    of.GATE_UP_BIAS: "gate_up_bias",
    of.DOWN_BIAS: "down_bias",
}
MATRICES = {of.QKV: "qkv", of.OUT: "out", of.GATE_UP: "gate_up", of.DOWN: "down"}


class CompiledReader(Reader):
    """`cache` is one of `bdcli.backends.cpu.caches`. Calls use the process's one pool of threads."""

    def __init__(
        self,
        model: Model,
        cache: PanelFullCache | PanelOfficialCache | PanelBudgetCache,
        vocab: int | None = None,
    ):
        super().__init__(model, cache, vocab)
        self._kept: list[Tensor] = []  # what addresses in the tables point to
        self._pool = pool()
        self._table: np.ndarray | None = None
        self._tokens = np.zeros(0, np.int64)

    @property
    def exact(self) -> bool:
        return True  # bit for bit, in every dtype (`micro`)

    # -- tables

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _floats(self, tensor: Tensor | None) -> int:
        return self._address(None if tensor is None else tensor.float().contiguous())

    def _build(self) -> None:
        """The model's table and scratch for steps of up to MAX_CALL_ROWS rows, once the prompt is read."""
        m, c, cache = self.model, self.model.config, self.cache
        size = of.MODEL_FIELDS + c.layers * of.LAYER_FIELDS
        self._table = np.zeros(size, np.int64)
        cos, sin = rotations(c.rope, cache.capacity, cache.total_length)
        fields = {
            of.KIND: FLOATS if m.dtype is not torch.bfloat16 else DOTS if dots_pay() else PAIRS,
            of.HIDDEN: c.hidden_size,
            of.INNER: c.intermediate_size,
            of.LAYERS: c.layers,
            of.HEADS: c.heads,
            of.KV_HEADS: c.kv_heads,
            of.DIM: c.head_dim,
            of.VOCAB: c.vocab_size,
            of.EMBEDDING: self._address(m.embedding),
            of.FINAL_NORM: self._floats(m.norm),
            of.HEAD: self._address(m.head),
            of.COS: self._address(cos),
            of.SIN: self._address(sin),
            **cache.geometry,
        }
        for field, value in fields.items():
            self._table[field] = value
        _set_float(self._table, of.EPS, c.norm_eps)
        _set_float(self._table, of.SCALE, c.head_dim**-0.5)
        for i, layer in enumerate(m.layers):
            at = of.MODEL_FIELDS + i * of.LAYER_FIELDS
            for field, value in self._layer_fields(i, layer).items():
                self._table[at + field] = value
        self._call = np.zeros(of.CALL_FIELDS, np.int64)
        self._plan_scratch()
        self._table[of.TILED] = self._choose_products()

    def _choose_products(self) -> int:
        """BY_TILES bits for steps from here on; the cache is left as it is."""
        c, cache = self.model.config, self.cache
        if self.model.dtype is not torch.bfloat16 or c.vocab_size < tiles.TILE_ROWS or not tiles.available():
            return 0
        room = min(VERIFY_ROWS, cache.max_rows, cache.capacity - cache.length)
        sizes = c.hidden_size, c.intermediate_size, c.layers, c.heads, c.kv_heads, c.head_dim, c.vocab_size
        slots = 1 << min(cache.slots, cache.length).bit_length()
        shape = f"{'x'.join(map(str, sizes))}, {slots} slots, {room} rows, {self._pool.threads} threads"
        logits = torch.empty(room, c.vocab_size)

        def step(bits: int, rows: int) -> None:
            self._table[of.TILED] = bits
            self._set_up([0] * rows, 0)
            self._call[of.LOGIT_ROWS], self._call[of.LOGITS] = rows, logits.data_ptr()
            self._pool.run(self._table.ctypes.data, self._call.ctypes.data)

        return tiled(shape, (1, room), step)

    def _layer_fields(self, i: int, layer: Layer) -> dict[int, int]:
        cache = self.cache
        vectors = {field: self._floats(getattr(layer, name)) for field, name in VECTORS.items()}
        matrices = {field: self._address(getattr(layer, name).contiguous()) for field, name in MATRICES.items()}
        panels = {of.KEYS: cache.panel_keys[i].data_ptr(), of.VALUES: cache.panel_values[i].data_ptr()}
        return vectors | matrices | panels

    def _plan_scratch(self) -> None:
        c, rows, threads = self.model.config, of.MAX_CALL_ROWS, self._pool.threads
        width = c.heads * c.head_dim
        chunks = -(-self.cache.slots // of.CHUNK)
        shared = {
            of.ARRIVED: 64,
            of.CLAIMS: 3 * 64,
            of.X: 4 * rows * c.hidden_size,
            of.QUERIES: 4 * rows * width,
            of.RANK_QUERIES: 4 * rows * width,
            of.PARTS: 4 * chunks * rows * c.heads * (2 + c.head_dim),
            of.GATED: 4 * rows * c.intermediate_size,
        }
        own = {
            of.NARROW: 4 * rows * max(c.hidden_size, width),
            of.TILE: 4 * rows * max(of.TILE_COLUMNS, c.head_dim),
            of.UNSEEN: 16 * rows * of.UNSEEN_RANGES,
            of.SCORES: 4 * tiles.TILE_ROWS * of.BLOCK,
            of.SOFT: 4 * tiles.TILE_ROWS * of.BLOCK,
            of.CORNER: 4 * tiles.TILE_ROWS * max(48, c.head_dim),
        }
        offset = 0
        for field, size in own.items():
            self._call[field] = offset
            offset += _lines(size)
        self._call[of.OWN_BYTES] = offset
        shared[of.OWN] = offset * threads
        total = sum(_lines(size) for size in shared.values()) + 64
        memory = huge_zeros((total,), torch.uint8)
        at = _lines(self._address(memory))
        for field, size in shared.items():
            self._call[field] = at
            at += _lines(size)
        first = int(self._call[of.ARRIVED]) - memory.data_ptr()
        self._counts = memory.numpy()[first : first + 4 * 64].view(np.int64)
        self._call[of.THREADS] = threads
        self._configs = tiles.tile_configs()
        self._call[of.TILE_CONFIG] = self._configs.ctypes.data

    # -- steps

    def prefill(self, tokens: list[int], progress=None) -> None:
        super().prefill(tokens, progress)
        self._build()
        del self.cache.rope  # compiled steps have tables of their own
        if len(tokens) >= MUCH:
            give_back()

    def exclusive(self) -> AbstractContextManager:
        return _one_torch_thread()

    def feed(self, tokens: list[int], rows: int) -> Tensor:
        """As `Reader.feed`; a row's logits do not depend on the other rows."""
        logits = torch.empty(rows, self.model.config.vocab_size)
        known, block = self._known(tokens), min(of.MAX_CALL_ROWS, self.cache.max_rows)
        done = 0
        head = (len(known) - rows) % block or block  # so that whole blocks of rows with logits follow
        while done < len(known):
            take = min(block if done else min(head, len(known)), len(known) - done)
            wanted = max(0, min(take, done + take - (len(known) - rows)))
            at = max(0, done - (len(known) - rows))
            self._step(known[done : done + take], wanted, logits[at : at + wanted])
            done += take
        return self.aligned(logits)

    @classmethod
    def feed_together(
        cls, readers: Sequence[Reader], tokens: Sequence[list[int]], rows: Sequence[int]
    ) -> Sequence[Tensor]:
        """As `Reader.feed_together`, one text after another: a step here is bound by the text's own KV."""
        return [reader.feed(*work) for reader, *work in zip(readers, tokens, rows, strict=True)]

    def _step(self, tokens: list[int], wanted: int, logits: Tensor) -> None:
        call = self._begin(tokens, 0)
        call[of.LOGIT_ROWS], call[of.LOGITS] = wanted, logits.data_ptr()
        self._run(len(tokens))

    def _begin(self, tokens: list[int], drafts: int) -> np.ndarray:
        if self._table is None:
            self._build()
        self.cache.admit(self.cache.length, len(tokens) + max(0, drafts - 1))
        return self._set_up(tokens, drafts)

    def _set_up(self, tokens: list[int], drafts: int) -> np.ndarray:
        if len(self._tokens) < len(tokens) + drafts:
            self._tokens = np.zeros(2 * (len(tokens) + drafts), np.int64)
        self._tokens[: len(tokens)] = tokens
        call = self._call
        call[of.ROWS], call[of.START], call[of.TOKENS] = len(tokens), self.cache.length, self._tokens.ctypes.data
        call[of.DRAFT] = drafts
        self._counts[:] = 0
        return call

    def _run(self, read: int) -> None:
        self._pool.run(self._table.ctypes.data, self._call.ctypes.data)
        self.cache.length += read
        self.cache.count(self.cache.length)

    def draft(
        self, ids: list[int], gamma: int, sampling: Sampling, generator: torch.Generator
    ) -> tuple[list[int], Tensor | None]:
        """As `Reader.draft`, all of it in one call."""
        tokens, block = self._known(ids[self.length :]), min(of.MAX_CALL_ROWS, self.cache.max_rows)
        while len(tokens) > block:
            self._step(tokens[:block], 0, torch.empty(0))
            tokens = tokens[block:]
        own = self.model.config.vocab_size
        logits = torch.empty(own)
        q = None if sampling.greedy else torch.zeros(gamma, self.vocab)
        call = self._begin(tokens, gamma)
        call[of.LOGITS], call[of.KNOWN] = logits.data_ptr(), min(own, self.vocab)
        call[of.Q_ROWS] = 0 if q is None else q.data_ptr()
        if q is not None:
            call[of.SEED] = torch.randint(2**63 - 1, (), generator=generator)
            call[of.Q_STRIDE], call[of.TOP_K] = 4 * self.vocab, sampling.top_k
            _set_float(call, of.TEMPERATURE, sampling.temperature)
            _set_float(call, of.TOP_P, sampling.top_p)
        self._run(len(tokens) + gamma - 1)
        drafted = self._tokens[len(tokens) : len(tokens) + gamma].tolist()
        if min(drafted) < 0:
            raise non_finite("drafter")
        return drafted, q

    @classmethod
    def draft_together(
        cls,
        readers: Sequence[Reader],
        ids: Sequence[list[int]],
        gammas: Sequence[int],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
    ) -> list[tuple[list[int], Tensor | None]]:
        """As `Reader.draft_together`, one text after another."""
        work = zip(readers, ids, gammas, generators, strict=True)
        return [r.draft(text, gamma, sampling, g) if gamma else ([], None) for r, text, gamma, g in work]


@functools.lru_cache(maxsize=2)
def rotations(rope: RopeConfig, positions: int, total_length: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float [positions, D/2] each; a target and its drafter share them where their frequencies agree."""
    table, half = RopeTable(rope, positions, total_length, torch.float32, "cpu"), rope.head_dim // 2
    return table.cos[:, 0, :half].contiguous(), table.sin[:, 0, half:].contiguous()


def _lines(size: int) -> int:
    """`size` bytes, or an address, rounded up to a cache line."""
    return -(-size // 64) * 64


def _set_float(table: np.ndarray, field: int, value: float) -> None:
    table.view(np.float32)[2 * field] = value


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """torch's threads spin for milliseconds after each operation that used them; a round has to do without them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
