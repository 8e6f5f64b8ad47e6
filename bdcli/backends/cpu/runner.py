"""A runner whose steps are compiled: one call into machine code a forward.

Prefill stays torch's, whose GEMMs are fast; decoding and drafting read the model's own weights in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Tensor

from bdcli.backends.cpu import amx, tables
from bdcli.backends.cpu.autotune import tiled
from bdcli.backends.cpu.blocks import kind_of_format
from bdcli.backends.cpu.caches import PanelBudgetCache, PanelFullCache, PanelOfficialCache
from bdcli.backends.cpu.machine.huge_pages import give_back, huge_zeros
from bdcli.backends.cpu.machine.support import dots_pay
from bdcli.backends.cpu.pool import pool
from bdcli.backends.cpu.products import DOTS, FLOATS, PAIRS
from bdcli.model.config import RopeConfig
from bdcli.model.llama import Layer, Model
from bdcli.model.quantised import QuantisedMatrix, Weight
from bdcli.model.rope import RopeTable
from bdcli.speculation.runner import Runner

TRIM_TOKENS = 1024  # a longer prompt leaves memory to give back
VERIFY_ROWS = 9  # read at once where products are chosen, beside one row
VECTORS = {  # fields of a layer that are few numbers and kept as floats
    tables.ATTENTION_NORM: "attention_norm",
    tables.QKV_BIAS: "qkv_bias",
    tables.QK_NORM: "qk_norm",
    tables.OUT_BIAS: "out_bias",
    tables.MLP_NORM: "mlp_norm",
    tables.GATE_UP_BIAS: "gate_up_bias",
    tables.DOWN_BIAS: "down_bias",
}
MATRICES = {  # fields of a layer for a matrix's address and for its kind
    (tables.QKV, tables.QKV_KIND): "qkv",
    (tables.OUT, tables.OUT_KIND): "out",
    (tables.GATE_UP, tables.GATE_UP_KIND): "gate_up",
    (tables.DOWN, tables.DOWN_KIND): "down",
}


class CompiledRunner(Runner):
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
        self.tokens = np.zeros(0, np.int64)

    @property
    def exact(self) -> bool:
        return True  # bit for bit, in every dtype (`products`)

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
        size = tables.MODEL_FIELDS + c.layers * tables.LAYER_FIELDS
        self._table = np.zeros(size, np.int64)
        self._kind = FLOATS if m.dtype is not torch.bfloat16 else DOTS if dots_pay() else PAIRS
        cos, sin = rotations(c.rope, cache.capacity, cache.total_length)
        fields = {
            tables.KIND: self._kind,
            tables.HIDDEN: c.hidden_size,
            tables.INNER: c.intermediate_size,
            tables.LAYERS: c.layers,
            tables.HEADS: c.heads,
            tables.KV_HEADS: c.kv_heads,
            tables.DIM: c.head_dim,
            tables.VOCAB: c.vocab_size,
            tables.FINAL_NORM: self._floats(m.norm),
            tables.COS: self._address(cos),
            tables.SIN: self._address(sin),
            **self._matrix(m.embedding, tables.EMBEDDING, tables.EMBEDDING_KIND),
            **self._matrix(m.head, tables.HEAD, tables.HEAD_KIND),
            **cache.geometry,
        }
        for field, value in fields.items():
            self._table[field] = value
        set_float(self._table, tables.EPS, c.norm_eps)
        set_float(self._table, tables.SCALE, c.head_dim**-0.5)
        for i, layer in enumerate(m.layers):
            at = tables.MODEL_FIELDS + i * tables.LAYER_FIELDS
            for field, value in self._layer_fields(i, layer).items():
                self._table[at + field] = value
        self._call = np.zeros(tables.CALL_FIELDS, np.int64)
        self._plan_scratch()
        self._table[tables.TILED] = self._choose_products()

    def _choose_products(self) -> int:
        """BY_TILES bits for steps from here on; the cache is left as it is."""
        c, cache = self.model.config, self.cache
        if self.model.dtype is not torch.bfloat16 or c.vocab_size < amx.TILE_ROWS or not amx.available():
            return 0
        rows = min(VERIFY_ROWS, cache.max_rows, cache.capacity - cache.length)
        sizes = c.hidden_size, c.intermediate_size, c.layers, c.heads, c.kv_heads, c.head_dim, c.vocab_size
        slots = 1 << min(cache.slots, cache.length).bit_length()
        shape = f"{'x'.join(map(str, sizes))}, {slots} slots, {rows} rows, {self._pool.threads} threads"
        logits = torch.empty(rows, c.vocab_size)

        def step(bits: int, count: int) -> None:
            self._table[tables.TILED] = bits
            self._set_up([0] * count, 0)
            self._call[tables.LOGIT_ROWS], self._call[tables.LOGITS] = count, logits.data_ptr()
            self._pool.run(self._table.ctypes.data, self._call.ctypes.data)

        return tiled(shape, (1, rows), step)

    def _layer_fields(self, i: int, layer: Layer) -> dict[int, int]:
        cache = self.cache
        vectors = {field: self._floats(getattr(layer, name)) for field, name in VECTORS.items()}
        matrices: dict[int, int] = {}
        for fields, name in MATRICES.items():
            matrices |= self._matrix(getattr(layer, name), *fields)
        panels = {tables.KEYS: cache.panel_keys[i].data_ptr(), tables.VALUES: cache.panel_values[i].data_ptr()}
        return vectors | matrices | panels

    def _matrix(self, weight: Weight, address: int, kind: int) -> dict[int, int]:
        """Fields of a matrix: where it lies and how it is stored."""
        if isinstance(weight, QuantisedMatrix):
            return {
                address: self._address(weight.data),
                kind: kind_of_format(weight.format, 3 if self._kind == FLOATS else 2),
            }
        return {address: self._address(weight.contiguous()), kind: self._kind}

    def _plan_scratch(self) -> None:
        c, rows, threads = self.model.config, tables.MAX_CALL_ROWS, self._pool.threads
        width = c.heads * c.head_dim
        chunks = -(-self.cache.slots // tables.TASK_SLOTS)
        shared = {
            tables.ARRIVED: 64,
            tables.CLAIMS: 3 * 64,
            tables.X: 4 * rows * c.hidden_size,
            tables.QUERIES: 4 * rows * width,
            tables.RANK_QUERIES: 4 * rows * width,
            tables.PARTS: 4 * chunks * rows * c.heads * (2 + c.head_dim),
            tables.GATED: 4 * rows * c.intermediate_size,
        }
        own = {
            tables.NARROW: 4 * rows * max(c.hidden_size, width),
            tables.TILE: 4 * rows * max(tables.TILE_COLUMNS, c.head_dim),
            tables.UNSEEN: 16 * rows * tables.UNSEEN_RANGES,
            tables.SCORES: 4 * amx.TILE_ROWS * tables.BLOCK,
            tables.SOFT: 4 * amx.TILE_ROWS * tables.BLOCK,
            tables.CORNER: 4 * amx.TILE_ROWS * max(48, c.head_dim),
        }
        offset = 0
        for field, size in own.items():
            self._call[field] = offset
            offset += _lines(size)
        self._call[tables.OWN_BYTES] = offset
        shared[tables.OWN] = offset * threads
        total = sum(_lines(size) for size in shared.values()) + 64
        memory = huge_zeros((total,), torch.uint8)
        at = _lines(self._address(memory))
        for field, size in shared.items():
            self._call[field] = at
            at += _lines(size)
        first = int(self._call[tables.ARRIVED]) - memory.data_ptr()
        self._counts = memory.numpy()[first : first + 4 * 64].view(np.int64)
        self._call[tables.THREADS] = threads
        self._configs = amx.tile_configs()
        self._call[tables.TILE_CONFIG] = self._configs.ctypes.data

    # -- steps

    def prefill(self, tokens: list[int], on_block: Callable[[int, int], None] | None = None) -> None:
        super().prefill(tokens, on_block)
        self._build()
        del self.cache.rope  # compiled steps have tables of their own
        if len(tokens) >= TRIM_TOKENS:
            give_back()

    def exclusive(self) -> AbstractContextManager:
        return _one_torch_thread()

    def feed(self, tokens: list[int], rows: int) -> Tensor:
        """As `Runner.feed`; a row's logits do not depend on the other rows."""
        logits = torch.empty(rows, self.model.config.vocab_size)
        known, block = self.known(tokens), min(tables.MAX_CALL_ROWS, self.cache.max_rows)
        done = 0
        head = (len(known) - rows) % block or block  # so that whole blocks of rows with logits follow
        while done < len(known):
            take = min(block if done else min(head, len(known)), len(known) - done)
            wanted = max(0, min(take, done + take - (len(known) - rows)))
            at = max(0, done - (len(known) - rows))
            self.step(known[done : done + take], wanted, logits[at : at + wanted])
            done += take
        return self.aligned(logits)

    @classmethod
    def feed_together(
        cls, runners: Sequence[Runner], tokens: Sequence[list[int]], rows: Sequence[int]
    ) -> Sequence[Tensor]:
        """As `Runner.feed_together`, one text after another: a step here is bound by the text's own KV."""
        return [runner.feed(*work) for runner, *work in zip(runners, tokens, rows, strict=True)]

    def step(self, tokens: list[int], wanted: int, logits: Tensor) -> None:
        call = self.begin(tokens, 0)
        call[tables.LOGIT_ROWS], call[tables.LOGITS] = wanted, logits.data_ptr()
        self.run(len(tokens))

    def begin(self, tokens: list[int], drafts: int) -> np.ndarray:
        if self._table is None:
            self._build()
        self.cache.reserve(self.cache.length, len(tokens) + max(0, drafts - 1))
        return self._set_up(tokens, drafts)

    def _set_up(self, tokens: list[int], drafts: int) -> np.ndarray:
        if len(self.tokens) < len(tokens) + drafts:
            self.tokens = np.zeros(2 * (len(tokens) + drafts), np.int64)
        self.tokens[: len(tokens)] = tokens
        call = self._call
        call[tables.ROWS], call[tables.START], call[tables.TOKENS] = (
            len(tokens),
            self.cache.length,
            self.tokens.ctypes.data,
        )
        call[tables.DRAFT] = drafts
        self._counts[:] = 0
        return call

    def run(self, read: int) -> None:
        self._pool.run(self._table.ctypes.data, self._call.ctypes.data)
        self.cache.length += read
        self.cache.record(self.cache.length)


@functools.lru_cache(maxsize=2)
def rotations(rope: RopeConfig, positions: int, total_length: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float [positions, D/2] each; a target and its drafter share them where their frequencies agree."""
    table, half = RopeTable(rope, positions, total_length, torch.float32, "cpu"), rope.head_dim // 2
    return table.cos[:, 0, :half].contiguous(), table.sin[:, 0, half:].contiguous()


def _lines(size: int) -> int:
    """`size` bytes, or an address, rounded up to a cache line."""
    return -(-size // 64) * 64


def set_float(table: np.ndarray, field: int, value: float) -> None:
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
