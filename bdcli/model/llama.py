"""A lean Llama-family decoder: fused projections, no modules in the way, attention left to the cache.

The cache decides what a query sees and how keys are rotated (`bdcli.cache.full`); the model is everything else.
Weights have the names and layouts of Hugging Face checkpoints on disk (`bdcli.model.checkpoint`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bdcli.base.devices import product_dtype
from bdcli.model.config import ModelConfig
from bdcli.model.quantised import QuantisedMatrix, Weight, dense, nbytes, quantise

PREFILL_BLOCK = 512  # rows of a prefill block: wide enough for GEMM speed, small enough for the MLP's activations


class Cache(Protocol):
    """What the model asks of a cache. Shapes: qk [T, H+Hkv, D] unrotated, v [T, Hkv, D], q as `write` returns it."""

    length: int
    max_rows: int  # the most rows one `plan` may have after prefill
    reads_whole_prompt: bool  # prefill asks `read_prompt` once a layer instead of `read` once a block
    row_operations: type[RowOperations]  # what a backend reads prompts with

    def begin_prefill(self, tokens: int) -> None: ...
    def prompt_needs(self, layer: int) -> tuple[int, int]: ...  # first tokens, and where the last ones begin
    def end_layer(self, layer: int) -> None: ...
    def end_prefill(self) -> None: ...
    def plan(self, start: int, rows: int) -> object: ...
    def write(self, layer: int, plan: object, qk: Tensor, v: Tensor) -> object: ...
    def read(self, layer: int, plan: object, q: object) -> Tensor: ...
    def read_prompt(self, layer: int, q: Tensor) -> Tensor: ...


class RowOperations:
    """What happens to a prompt's rows between products, and to weights before them, in torch."""

    @staticmethod
    def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
        """A weight as a tensor of `dtype`."""
        return dense(weight, dtype)

    @staticmethod
    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm of rows x [T, hidden]."""
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    @staticmethod
    def gate(gate_up: Tensor) -> Tensor:
        """silu(gate) · up [T, inner] of rows that hold both side by side."""
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up


@dataclass(slots=True)
class Layer:
    """Weights of one block. qkv stacks q, k, v rows; gate_up stacks gate and up; qk_norm is [H+Hkv, D]."""

    attention_norm: Tensor
    qkv: Weight
    out: Weight
    mlp_norm: Tensor
    gate_up: Weight
    down: Weight
    qkv_bias: Tensor | None = None
    out_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    qk_norm: Tensor | None = None

    def dense(self, dtype: torch.dtype, rows: type[RowOperations] = RowOperations) -> Layer:
        """This layer with every weight as a tensor of `dtype`; what is one already is shared."""
        matrices = self.qkv, self.out, self.gate_up, self.down
        if self.attention_norm.dtype is dtype and all(isinstance(w, Tensor) for w in matrices):
            return self
        own = ((name, getattr(self, name)) for name in Layer.__slots__)
        return Layer(**{name: None if w is None else rows.dense(w, dtype) for name, w in own})

    def quantised(self, bits: int) -> Layer:
        """This layer with its matrices in 4 or 8 bits; the rest is shared."""
        matrices = ("qkv", "out", "gate_up", "down")
        return replace(self, **{name: quantise(getattr(self, name), bits) for name in matrices})


@dataclass(slots=True)
class Model:
    """A decoder. Matrices may be in blocks of 4 or 8 bits (`bdcli.model.quantised`), all else is in `dtype`."""

    config: ModelConfig
    embedding: Weight  # [V, hidden]
    layers: list[Layer]
    norm: Tensor
    head: Weight  # [V, hidden]; the embedding itself when tied

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, caches and dense weights."""
        return self.norm.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def dense(self) -> Model:
        """This model with every matrix as a tensor of its dtype; itself where all of them are."""
        if not any(isinstance(w, QuantisedMatrix) for w in self.tensors()):
            return self
        embedding = dense(self.embedding, self.dtype)
        head = embedding if self.head is self.embedding else dense(self.head, self.dtype)
        layers = [layer.dense(self.dtype) for layer in self.layers]
        return Model(self.config, embedding, layers, self.norm, head)

    def draft_weights(self, bits: int) -> Model:
        """A drafter of the same weights in fewer bits, which shares what it does not multiply by."""
        layers = [layer.quantised(bits) for layer in self.layers]
        return Model(self.config, self.embedding, layers, self.norm, quantise(self.head, 8))

    @property
    def weights(self) -> str:
        """What most weights are stored in: int4, int8, or a dtype."""
        matrix = self.layers[0].gate_up if self.layers else self.embedding
        return f"int{matrix.format.bits}" if isinstance(matrix, QuantisedMatrix) else str(self.dtype)[6:]

    def tensors(self) -> list[Weight]:
        """Every distinct weight."""
        own = [getattr(layer, name) for layer in self.layers for name in Layer.__slots__]
        head = [] if self.head is self.embedding else [self.head]
        return [self.embedding, self.norm, *head, *(t for t in own if t is not None)]

    @property
    def weight_bytes(self) -> int:
        return sum(map(nbytes, self.tensors()))

    def embed(self, tokens: list[int]) -> Tensor:
        index = torch.tensor(tokens, device=self.device)
        if isinstance(self.embedding, QuantisedMatrix):
            return self.embedding.take_rows(index, self.dtype)
        return F.embedding(index, self.embedding)

    def project(self, layer: Layer, x: Tensor, rows: type[RowOperations] = RowOperations) -> tuple[Tensor, Tensor]:
        """Residual stream x [T, hidden] to unrotated qk [T, H+Hkv, D] and v [T, Hkv, D]."""
        return self.project_normed(layer, rows.norm(x, layer.attention_norm, self.config.norm_eps))

    def project_normed(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        """`project` of rows that went through the layer's first norm."""
        c = self.config
        qkv = F.linear(x, layer.qkv, layer.qkv_bias).view(x.shape[0], c.heads + 2 * c.kv_heads, c.head_dim)
        qk, v = qkv.split((c.heads + c.kv_heads, c.kv_heads), 1)
        if layer.qk_norm is not None:
            qk = F.rms_norm(qk, (c.head_dim,), None, c.norm_eps) * layer.qk_norm
        return qk, v

    def mix(self, layer: Layer, x: Tensor, attended: Tensor, rows: type[RowOperations] = RowOperations) -> Tensor:
        """Residual stream after attention output [T, H·D] and the MLP."""
        x = x + F.linear(attended, layer.out, layer.out_bias)
        y = rows.norm(x, layer.mlp_norm, self.config.norm_eps)
        gated = rows.gate(F.linear(y, layer.gate_up, layer.gate_up_bias))
        return x + F.linear(gated, layer.down, layer.down_bias)

    def logits(self, x: Tensor) -> Tensor:
        """fp32 logits [T, V] of residual rows x [T, hidden]."""
        x = F.rms_norm(x, (self.config.hidden_size,), self.norm, self.config.norm_eps)
        return F.linear(x, dense(self.head, self.dtype)).float()

    @torch.inference_mode()
    def prefill(self, tokens: list[int], cache: Cache, on_block: Callable[[int, int], None] | None = None) -> None:
        """Fill an empty cache with `tokens`, layer by layer, so that at most one layer's full keys need to live.

        A layer reads the blocks of rows that its cache needs, each as in a reading of all of them. No logits are made,
        so the last layer stops at its keys and values. `on_block(done, total)` counts tokens that all layers have read.
        """
        cache.begin_prefill(len(tokens))
        starts, report = range(0, len(tokens), PREFILL_BLOCK), on_block or (lambda *_: None)
        dtype, rows = self._prompt_dtype(), cache.row_operations
        needs = [cache.prompt_needs(i) for i in range(len(self.layers))]
        parts = [[a for a in starts if a < head or a + PREFILL_BLOCK > first] for head, first in needs] + [[]]
        x = {a: self.embed(tokens[a : a + PREFILL_BLOCK]).to(dtype) for a in parts[0]}
        done, total = 0, sum(map(len, parts))
        for i, stored in enumerate(self.layers):
            layer, waiting = stored.dense(dtype, rows), []
            for a in parts[i]:
                plan = cache.plan(a, len(x[a]))
                qk, v = self.project(layer, x[a], rows)
                q = cache.write(i, plan, qk.to(self.dtype), v.to(self.dtype))
                if a not in parts[i + 1]:
                    del x[a]  # no layer above reads it
                elif cache.reads_whole_prompt:
                    waiting.append(q)
                    continue
                else:
                    x[a] = self.mix(layer, x[a], cache.read(i, plan, q).to(dtype), rows)
                report((done := done + 1) * len(tokens) // total, len(tokens))
            if waiting:
                attended = cache.read_prompt(i, torch.cat(waiting))
                for a in parts[i]:
                    x[a] = self.mix(layer, x[a], attended[a : a + PREFILL_BLOCK].to(dtype), rows)
                    report((done := done + 1) * len(tokens) // total, len(tokens))
            cache.end_layer(i)
        cache.end_prefill()

    def _prompt_dtype(self) -> torch.dtype:
        """What a prompt's rows are multiplied in: fp32 also for bf16 weights, where the processor is faster so."""
        on_cpu = self.device.type == "cpu" and self.dtype is torch.bfloat16
        return product_dtype("cpu") if on_cpu else self.dtype

    def forward(self, tokens: list[int], cache: Cache, rows: int) -> Tensor:
        """Append `tokens` to the cache; fp32 logits [rows, V] of the last `rows` of them, at most `cache.max_rows`."""
        return self.forward_together([tokens], [cache], [rows])[0]

    @torch.inference_mode()
    def forward_together(
        self, tokens: Sequence[list[int]], caches: Sequence[Cache], rows: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """`forward` of several texts, each with a cache of its own: the weights are read once for all of them."""
        unread = []
        for text, cache, wanted in zip(tokens, caches, rows, strict=True):
            if wanted > cache.max_rows:
                raise RuntimeError(f"{wanted} rows at once, but this cache takes {cache.max_rows}")
            head = max(0, len(text) - cache.max_rows)
            for a in range(0, head, cache.max_rows):  # a lagging cache catches up in blocks it can hold
                self._append([text[a : min(a + cache.max_rows, head)]], [cache])
            unread.append(text[head:])
        ends = self._append(unread, caches).split([len(text) for text in unread])
        return self.logits(torch.cat([x[-wanted:] for x, wanted in zip(ends, rows)])).split(list(rows))

    def _append(self, tokens: Sequence[list[int]], caches: Sequence[Cache]) -> Tensor:
        """Residual rows [Σ T, hidden] of tokens appended to their caches, text after text."""
        sizes = [len(text) for text in tokens]
        x = self.embed([token for text in tokens for token in text])
        plans = [cache.plan(cache.length, size) for cache, size in zip(caches, sizes)]
        for i, stored in enumerate(self.layers):
            layer = stored.dense(self.dtype)
            qk, v = self.project(layer, x)
            texts = zip(caches, plans, qk.split(sizes), v.split(sizes))
            seen = [cache.read(i, plan, cache.write(i, plan, qk, v)) for cache, plan, qk, v in texts]
            x = self.mix(layer, x, torch.cat(seen) if len(seen) > 1 else seen[0])
        for cache, size in zip(caches, sizes):
            cache.length += size
        return x
