"""Weight matrices in blocks of 4-bit or 8-bit codes, packed the way compiled steps read them.

    value = scale · code + offset        one scale and offset a block of `BlockFormat.block` neighbours in a row

Sixteen rows lie side by side in a *panel*; a panel's records follow one another along the inputs. A record holds the
scales, then the offsets, of its 16 rows, then the codes in 16 lanes of four bytes, one lane a row: four inputs of 8
bits a lane, or eight of 4 bits, the first four in the low halves of the bytes. So one vector instruction serves 16
rows, and a panel is read from its first byte to its last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bdcli.base.errors import UserError

LANES = 16  # rows of a panel
_BIAS = 128  # added to codes of 8 bits, which are signed, where they are stored


@dataclass(frozen=True)
class BlockFormat:
    """How the blocks of a matrix are stored. Without offsets, codes of 8 bits are signed and offsets are 0."""

    name: str
    bits: int
    block: int
    scale_dtype: torch.dtype
    offsets: bool

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of a record, and of its offsets."""
        return LANES * self.scale_dtype.itemsize

    @property
    def code_at(self) -> int:
        """Where the codes of a record begin."""
        return self.scale_bytes * (2 if self.offsets else 1)

    @property
    def record(self) -> int:
        """Bytes of one block of 16 rows."""
        return self.code_at + LANES * self.block * self.bits // 8

    @property
    def weight_bytes(self) -> float:
        """Bytes of a weight, its share of scales and offsets included."""
        return self.record / (LANES * self.block)


INT4 = BlockFormat("int4", 4, 32, torch.float16, True)
INT4_FLOAT = BlockFormat("int4 with float scales", 4, 32, torch.float32, True)
INT8 = BlockFormat("int8", 8, 32, torch.float16, False)
INT8_FLOAT = BlockFormat("int8 with float scales", 8, 16, torch.float32, True)
FORMATS = (INT4, INT4_FLOAT, INT8, INT8_FLOAT)


@dataclass(frozen=True, eq=False)
class QuantisedMatrix:
    """A matrix [rows, inputs]; `data` is uint8 [panels, blocks, record], rows of the last panel filled up with 0."""

    data: Tensor
    rows: int
    inputs: int
    format: BlockFormat

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.inputs

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    @property
    def device(self) -> torch.device:
        return self.data.device

    def blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes int8 [rows, inputs], scales and offsets float [rows, inputs / block]."""
        codes, scales, offsets = _unpacked(self.data, self.format)
        lead = self.data.shape[0] * LANES
        codes = codes.permute(0, 3, 1, 2).reshape(lead, self.inputs)
        scales, offsets = (x.permute(0, 2, 1).reshape(lead, -1) for x in (scales, offsets))
        return codes[: self.rows], scales[: self.rows], offsets[: self.rows]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix itself [rows, inputs], rounded to `dtype` once."""
        codes, scales, offsets = self.blocks()
        return _values(codes.view(self.rows, -1, self.format.block), scales, offsets).view(self.shape).to(dtype)

    def take_rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [T, inputs] of the matrix, as an embedding is looked up."""
        codes, scales, offsets = _unpacked(self.data[index // LANES], self.format)
        lane, row = index % LANES, torch.arange(len(index))
        values = _values(codes[row, :, :, lane], scales[row, :, lane], offsets[row, :, lane])
        return values.view(len(index), self.inputs).to(dtype)


Weight = Tensor | QuantisedMatrix


def pack(codes: Tensor, scales: Tensor, offsets: Tensor | None, form: BlockFormat) -> QuantisedMatrix:
    """Codes [rows, inputs] (0..15, or signed bytes), scales and offsets [rows, inputs / block], in format `form`.

    Without offsets `offsets` is None. Scales are rounded to the format's; `fitting_format` names one that keeps them.
    """
    rows, inputs = codes.shape
    count = -(-rows // LANES)
    spare = count * LANES - rows
    blocks = inputs // form.block

    def panels(x: Tensor) -> Tensor:
        """[rows, n] as [panels, lanes, n]."""
        return torch.nn.functional.pad(x, (0, 0, 0, spare)).view(count, LANES, -1)

    data = torch.empty(count, blocks, form.record, dtype=torch.uint8)
    sides = [scales, offsets] if form.offsets else [scales]
    for i, side in enumerate(sides):
        at = panels(side.to(form.scale_dtype)).transpose(1, 2).contiguous()
        data[..., i * form.scale_bytes : (i + 1) * form.scale_bytes] = at.view(torch.uint8)
    codes = panels(codes.view(torch.uint8))
    if form.bits == 4:
        low, high = codes.view(count, LANES, -1, 2, 4).unbind(3)
        codes = low | high << 4
    else:
        codes = codes ^ _BIAS
    lanes = codes.contiguous().view(torch.int32).view(count, LANES, blocks, -1).permute(0, 2, 3, 1).contiguous()
    data[..., form.code_at :] = lanes.view(torch.uint8).view(count, blocks, -1)
    return QuantisedMatrix(data, rows, inputs, form)


def fitting_format(scales: Tensor, offsets: Tensor | None, bits: int, block: int) -> BlockFormat:
    """The smallest format that keeps float scales and offsets exactly."""
    sides = [scales] if offsets is None else [scales, offsets]
    halves = all(torch.equal(side.half().float(), side) for side in sides)
    if bits == 4:
        return INT4 if halves else INT4_FLOAT
    return INT8 if halves and block == INT8.block and offsets is None else INT8_FLOAT


def quantise(weight: Weight, bits: int) -> QuantisedMatrix:
    """Round each value of a dense matrix [rows, inputs] to the nearest code: `--weights int4` and int8.

    int4 spans each block's least to its greatest value (as GGUF's Q4_1), int8 its greatest magnitude (Q8_0).
    Raises UserError where rows are no whole blocks.
    """
    form = INT4 if bits == 4 else INT8
    if weight.shape[1] % form.block:
        raise UserError(
            f"a matrix of {weight.shape[1]} inputs has no blocks of {form.block}", "Leave --weights and int4 out"
        )
    x = dense(weight, torch.float32).view(weight.shape[0], -1, form.block)
    if bits == 4:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        offsets = low.half().float()
        scales = ((high - offsets) / 15).half().float()
    else:
        offsets = torch.zeros(())
        scales = (x.abs().amax(-1, keepdim=True) / 127).half().float()
    codes = ((x - offsets) / scales.clamp(min=1e-12)).round_()
    codes = codes.clamp_(0, 15) if bits == 4 else codes.clamp_(-127, 127)
    sides = scales.squeeze(-1), offsets.squeeze(-1) if bits == 4 else None
    return pack(codes.to(torch.int8).view(weight.shape), *sides, form)


def stack(parts: Sequence[Weight], dtype: torch.dtype) -> Weight:
    """Matrices over the same inputs as one, row after row, in the smallest format that keeps all of them.

    Dense where one of them is, or where a part does not fill its last panel.
    """
    if len(parts) == 1:
        return parts[0]
    if any(isinstance(p, Tensor) or p.rows % LANES for p in parts[:-1]) or isinstance(parts[-1], Tensor):
        return torch.cat([dense(p, dtype) for p in parts])
    form = _common_format([p.format for p in parts])
    data = torch.cat([_converted(p, form).data for p in parts])
    return QuantisedMatrix(data, sum(p.rows for p in parts), parts[0].inputs, form)


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A weight as a tensor of `dtype`."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dense(dtype)


def nbytes(weight: Weight) -> int:
    return weight.numel() * weight.element_size() if isinstance(weight, Tensor) else weight.nbytes


def _common_format(forms: Sequence[BlockFormat]) -> BlockFormat:
    if len(set(forms)) == 1:
        return forms[0]
    return INT4_FLOAT if all(f.bits == 4 for f in forms) else INT8_FLOAT


def _converted(matrix: QuantisedMatrix, form: BlockFormat) -> QuantisedMatrix:
    if matrix.format is form:
        return matrix
    codes, scales, offsets = matrix.blocks()
    repeat = matrix.format.block // form.block
    scales, offsets = (x.repeat_interleave(repeat, 1) for x in (scales, offsets))
    return pack(codes, scales, offsets, form)


def _values(codes: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    """Floats [..., blocks, block] of codes; a product and a sum, each rounded, as GGUF's own dequantisation."""
    return codes.float().mul_(scales[..., None]).add_(offsets[..., None])


def _unpacked(data: Tensor, form: BlockFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [panels, blocks, block, LANES], scales and offsets float [panels, blocks, LANES] of records."""
    count, blocks, _ = data.shape
    size = form.scale_bytes
    scales = data[..., :size].contiguous().view(form.scale_dtype).float()
    offsets = data[..., size : 2 * size].contiguous().view(form.scale_dtype).float() if form.offsets else None
    codes = data[..., form.code_at :].reshape(count, blocks, -1, 1, LANES, 4)
    codes = torch.cat((codes & 15, codes >> 4), 3) if form.bits == 4 else codes ^ _BIAS
    codes = codes.transpose(-1, -2).reshape(count, blocks, form.block, LANES).view(torch.int8)
    return codes, scales, torch.zeros_like(scales) if offsets is None else offsets
