"""Quantised weights of GGUF files as codes with scales and offsets, and as plain numbers.

Layouts: `ggml-common.h` of ggml. A type is decoded by one function, from bytes [rows, blocks, bytes of a block].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bdcli.model.quantised import (
    INT4,
    INT4_FLOAT,
    INT8,
    INT8_FLOAT,
    BlockFormat,
    QuantisedMatrix,
    fitting_format,
    pack,
)

CHUNK_WEIGHTS = 2**20  # decoded at once: what is computed on the way stays in the caches


@dataclass(frozen=True)
class Blocks:
    """A matrix in codes: weight = scale · code + offset in fp32, exactly the weight of the file.

    Codes of 4 bits are 0..15 and always have offsets. Those of 8 bits are signed, and symmetric types have no offsets.
    """

    codes: Tensor  # int8 [rows, inputs]
    scales: Tensor  # fp32 [rows, inputs / block]
    offsets: Tensor | None  # fp32 [rows, inputs / block]
    bits: int  # 4 or 8; types of 5 and 6 bits have codes of 8
    block: int  # weights that share a scale: 16 or 32

    def values(self) -> Tensor:
        """The weights, fp32 [rows, inputs]."""
        weights = self.codes.unflatten(1, (-1, self.block)).float().mul_(self.scales[..., None])
        return (weights if self.offsets is None else weights.add_(self.offsets[..., None])).flatten(1)

    def packed(self) -> QuantisedMatrix:
        """The matrix in the smallest format that keeps it exactly."""
        form = fitting_format(self.scales, self.offsets, self.bits, self.block)
        scales, offsets = self.scales, self.offsets
        if form.offsets and offsets is None:
            offsets = torch.zeros_like(scales)
        repeat = self.block // form.block
        if repeat > 1:
            scales, offsets = (side.repeat_interleave(repeat, 1) for side in (scales, offsets))
        return pack(self.codes, scales, offsets, form)


@dataclass(frozen=True)
class Encoding:
    """How a type of tensor stores `block_weights` weights in `block_bytes` bytes."""

    name: str
    block_weights: int
    block_bytes: int
    dtype: torch.dtype | None = None  # of types that are plain numbers
    decode: Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]] | None = None  # codes, scales, offsets
    bits: int = 8
    form: BlockFormat | None = None  # of its codes in memory

    def row_bytes(self, weights: int) -> int:
        return weights // self.block_weights * self.block_bytes

    def blocks(self, stored: Tensor) -> Blocks:
        """Codes of the rows uint8 [rows, bytes] of a quantised type."""
        rows = stored.shape[0]
        codes, *sides = self.decode(stored.view(rows, -1, self.block_bytes))
        scales, offsets = (None if side is None else side.reshape(rows, -1) for side in sides)
        codes = codes.reshape(rows, -1)
        return Blocks(codes.view(torch.int8), scales, offsets, self.bits, codes.shape[1] // scales.shape[1])

    def numbers(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights of rows uint8 [rows, bytes], cast from fp32 to `dtype`."""
        if self.dtype is not None:
            return stored.view(self.dtype).to(dtype, copy=True)
        rows = stored.shape[0]
        out = torch.empty(rows, stored.shape[1] // self.block_bytes * self.block_weights, dtype=dtype)
        step = max(1, CHUNK_WEIGHTS // out.shape[1])
        for start in range(0, rows, step):
            out[start : start + step] = self.blocks(stored[start : start + step]).values()
        return out


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at` of each block as fp32 [rows, blocks, 1]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(stored: Tensor) -> Tensor:
    """Low nibbles of the last dimension, then its high ones."""
    return torch.cat((stored & 15, stored >> 4), -1)


def _bits(stored: Tensor) -> Tensor:
    """Bits of each byte, lowest first: [..., n] to [..., 8 n]."""
    return ((stored[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2)


def _q4_0(b: Tensor):
    scales = _half(b, 0)
    return _nibbles(b[..., 2:]), scales, scales * -8  # both products are exact in fp32, so their sum is the weight


def _q4_1(b: Tensor):
    return _nibbles(b[..., 4:]), _half(b, 0), _half(b, 2)


def _q5_0(b: Tensor):
    return (_nibbles(b[..., 6:]) | _bits(b[..., 2:6]) << 4) - 16, _half(b, 0), None


def _q5_1(b: Tensor):
    return _nibbles(b[..., 8:]) | _bits(b[..., 4:8]) << 4, _half(b, 0), _half(b, 2)


def _q8_0(b: Tensor):
    return b[..., 2:], _half(b, 0), None


def _scales_and_minima(b: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets [rows, blocks, 8] of Q4_K and Q5_K: two fp16 factors and 6-bit numbers in 12 bytes."""
    low, minimum, both = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scale = torch.cat((low & 63, (both & 15) | (low >> 2 & 48)), -1)
    least = torch.cat((minimum & 63, (both >> 4) | (minimum >> 2 & 48)), -1)
    return _half(b, 0) * scale.float(), -(_half(b, 2) * least.float())


def _q4_k(b: Tensor):
    return _nibbles(b[..., 16:].unflatten(-1, (4, 32))).flatten(-2), *_scales_and_minima(b)


def _q5_k(b: Tensor):
    low = _nibbles(b[..., 48:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)
    high = (b[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1
    return (low | high << 4).flatten(-2), *_scales_and_minima(b)


def _q6_k(b: Tensor):
    low = _nibbles(b[..., :128].unflatten(-1, (2, 64)))
    pairs = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    high = (b[..., 128:192].unflatten(-1, (2, 1, 32)) >> pairs) & 3
    scales = _half(b, 208) * b[..., 192:208].view(torch.int8).float()
    return (low.flatten(-2) | high.flatten(-3) << 4) - 32, scales, None


ENCODINGS = {  # by the number of ggml_type
    0: Encoding("F32", 1, 4, torch.float32),
    1: Encoding("F16", 1, 2, torch.float16),
    30: Encoding("BF16", 1, 2, torch.bfloat16),
    2: Encoding("Q4_0", 32, 18, decode=_q4_0, bits=4, form=INT4),
    3: Encoding("Q4_1", 32, 20, decode=_q4_1, bits=4, form=INT4),
    6: Encoding("Q5_0", 32, 22, decode=_q5_0, form=INT8),
    7: Encoding("Q5_1", 32, 24, decode=_q5_1, form=INT8_FLOAT),
    8: Encoding("Q8_0", 32, 34, decode=_q8_0, form=INT8),
    12: Encoding("Q4_K", 256, 144, decode=_q4_k, bits=4, form=INT4_FLOAT),
    13: Encoding("Q5_K", 256, 176, decode=_q5_k, form=INT8_FLOAT),
    14: Encoding("Q6_K", 256, 210, decode=_q6_k, form=INT8_FLOAT),
}
