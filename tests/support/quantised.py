"""Random matrices in blocks, and tiny models of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bdcli.model.llama import Model
from bdcli.model.quantised import BlockFormat, QuantisedMatrix, pack
from tests.support.compiled import FRESH, randn


def random_blocks(form: BlockFormat, rows: int, inputs: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and offsets that `form` keeps exactly."""
    low, high = (0, 16) if form.bits == 4 else (-128, 128)
    codes = torch.randint(low, high, (rows, inputs), generator=FRESH).to(torch.int8)
    shape = rows, inputs // form.block
    sides = 0.15 / high * randn(*shape), 0.05 * randn(*shape)
    scales, offsets = (x.to(form.scale_dtype).float() for x in sides)
    return codes, scales, offsets if form.offsets else None


def random_matrix(form: BlockFormat, rows: int, inputs: int) -> QuantisedMatrix:
    codes, scales, offsets = random_blocks(form, rows, inputs)
    return pack(codes, scales, offsets, form)


def in_blocks(model: Model, form: BlockFormat) -> Model:
    """A model of the same shape whose matrices are random ones in blocks of `form`."""

    def like(weight: Tensor) -> QuantisedMatrix:
        return random_matrix(form, *weight.shape)

    names = ("qkv", "out", "gate_up", "down")
    layers = [replace(layer, **{name: like(getattr(layer, name)) for name in names}) for layer in model.layers]
    return Model(model.config, like(model.embedding), layers, model.norm, like(model.head))
