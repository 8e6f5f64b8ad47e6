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

from bdcli.model.config import ModelConfig
from bdcli.model.quantised import QuantisedMatrix, Weight, dense, nbytes, quantise

PREFILL_BLOCK = 512  # rows of a prefill block: wide enough for GEMM speed, small enough for the MLP's activations


class Cache(Protocol):
    """What the model asks of a cache. Shapes: qk [T, H+Hkv, D] unrotated, v [T, Hkv, D], q as `write` returns it."""

    length: int
    max_rows: int  # the most rows one `plan` may have after prefill
    reads_whole_prompt: bool  # prefill asks `read_prompt` once a layer instead of `read` once a block

    def begin_prefill(self, tokens: int) -> None: ...
    def end_layer(self, layer: int) -> None: ...
    def end_prefill(self) -> None: ...
    def plan(self, start: int, rows: int) -> object: ...
    def write(self, layer: int, plan: object, qk: Tensor, v: Tensor) -> object: ...
    def read(self, layer: int, plan: object, q: object) -> Tensor: ...
    def read_prompt(self, layer: int, q: Tensor) -> Tensor: ...


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

    def dense(self, dtype: torch.dtype) -> Layer:
        """This layer with every weight as a tensor of `dtype`; what is one already is shared."""
        matrices = self.qkv, self.out, self.gate_up, self.down
        if self.attention_norm.dtype is dtype and all(isinstance(w, Tensor) for w in matrices):
            return self
        own = ((name, getattr(self, name)) for name in Layer.__slots__)
        return Layer(**{name: None if w is None else dense(w, dtype) for name, w in own})

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

    def project(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        """Residual stream x [T, hidden] to unrotated qk [T, H+Hkv, D] and v [T, Hkv, D]."""
        c = self.config
        return self.project_normed(layer, F.rms_norm(x, (c.hidden_size,), layer.attention_norm, c.norm_eps))

    def project_normed(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        """`project` of rows that went through the layer's first norm."""
        c = self.config
        qkv = F.linear(x, layer.qkv, layer.qkv_bias).view(x.shape[0], c.heads + 2 * c.kv_heads, c.head_dim)
        qk, v = qkv.split((c.heads + c.kv_heads, c.kv_heads), 1)
        if layer.qk_norm is not None:
            qk = F.rms_norm(qk, (c.head_dim,), None, c.norm_eps) * layer.qk_norm
        return qk, v

    def mix(self, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
        """Residual stream after attention output [T, H·D] and the MLP."""
        c = self.config
        x = x + F.linear(attended, layer.out, layer.out_bias)
        y = F.rms_norm(x, (c.hidden_size,), layer.mlp_norm, c.norm_eps)
        gate, up = F.linear(y, layer.gate_up, layer.gate_up_bias).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, layer.down, layer.down_bias)

    def logits(self, x: Tensor) -> Tensor:
        """fp32 logits [T, V] of residual rows x [T, hidden]."""
        x = F.rms_norm(x, (self.config.hidden_size,), self.norm, self.config.norm_eps)
        return F.linear(x, dense(self.head, self.dtype)).float()

    @torch.inference_mode()
    def prefill(self, tokens: list[int], cache: Cache, on_block: Callable[[int, int], None] | None = None) -> None:
        """Fill an empty cache with `tokens`, layer by layer, so that at most one layer's full keys need to live.

        No logits are made, so the last layer stops at its keys and values. `on_block(done, total)` counts blocks
        of layers.
        """
        spans = [(a, min(a + PREFILL_BLOCK, len(tokens))) for a in range(0, len(tokens), PREFILL_BLOCK)]
        total, done = len(spans) * len(self.layers), 0
        cache.begin_prefill(len(tokens))
        x = self.embed(tokens) if tokens else None
        for i, stored in enumerate(self.layers):
            layer, last = stored.dense(self.dtype), i == len(self.layers) - 1
            waiting = []
            for a, b in spans:
                plan = cache.plan(a, b - a)
                qk, v = self.project(layer, x[a:b])
                q = cache.write(i, plan, qk, v)
                if not last and cache.reads_whole_prompt:
                    waiting.append(q)
                elif not last:
                    x[a:b] = self.mix(layer, x[a:b], cache.read(i, plan, q))
                done += 1
                if on_block:
                    on_block(done, total)
            if waiting:
                attended = cache.read_prompt(i, torch.cat(waiting))
                for a, b in spans:
                    x[a:b] = self.mix(layer, x[a:b], attended[a:b])
            cache.end_layer(i)
        cache.end_prefill()

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
