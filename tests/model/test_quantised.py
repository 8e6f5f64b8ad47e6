"""Matrices in blocks of 4-bit and 8-bit codes: packing loses nothing, and rounding no more than half a code."""

from __future__ import annotations

import pytest
import torch

from bdcli.base.errors import UserError
from bdcli.model.quantised import (
    FORMATS,
    INT4,
    INT4_FLOAT,
    INT8,
    INT8_FLOAT,
    QuantisedMatrix,
    fitting_format,
    pack,
    quantise,
    stack,
)
from tests.support.compiled import randn
from tests.support.quantised import random_blocks, random_matrix

NAMED = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)


@NAMED
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_pack_keeps_codes_scales_and_offsets(form, rows):
    codes, scales, offsets = random_blocks(form, rows, 96)
    got = pack(codes, scales, offsets, form).blocks()
    assert torch.equal(got[0], codes)
    assert torch.equal(got[1], scales)
    assert torch.equal(got[2], torch.zeros_like(scales) if offsets is None else offsets)


@NAMED
def test_dense_is_scale_times_code_plus_offset(form):
    codes, scales, offsets = random_blocks(form, 37, 64)
    matrix, rows = pack(codes, scales, offsets, form), torch.tensor([0, 36, 5, 16, 5])
    want = codes.view(37, -1, form.block).float() * scales[..., None]
    want = (want if offsets is None else want + offsets[..., None]).view(37, 64)
    assert torch.equal(matrix.dense(torch.float32), want)
    assert torch.equal(matrix.dense(torch.bfloat16), want.bfloat16())
    assert torch.equal(matrix.take_rows(rows, torch.float32), want[rows])


@pytest.mark.parametrize("bits", [4, 8])
def test_quantise_rounds_to_the_nearest_code(bits):
    weight = randn(21, 160)
    matrix = quantise(weight, bits)
    scales = matrix.blocks()[1].repeat_interleave(32, 1)
    slack = 0.51 if bits == 8 else 0.6  # an offset in fp16 moves the ends of a block by a part of a code
    assert ((matrix.dense(torch.float32) - weight).abs() <= slack * scales).all()
    assert matrix.nbytes == 32 * 160 * bits // 8 + 32 * 5 * (4 if bits == 4 else 2)  # codes and sides of 32 rows


def test_quantise_finds_the_codes_again():
    """A bf16 folder made of a 4-bit file has the file's weights within bf16's rounding."""
    once = quantise(0.02 * randn(64, 256), 4).dense(torch.bfloat16)
    again = quantise(once, 4).dense(torch.float32)
    assert (again - once.float()).std() < 0.01 * once.float().std()


@pytest.mark.parametrize("constant", [0.0, 0.37, -3.0])
def test_quantise_keeps_a_constant_block(constant):
    weight = torch.full((16, 32), constant)
    for bits in (4, 8):
        assert torch.allclose(quantise(weight, bits).dense(torch.float32), weight, rtol=1e-2)


def test_quantise_refuses_rows_of_part_blocks():
    with pytest.raises(UserError, match="48 inputs has no blocks of 32"):
        quantise(randn(4, 48), 4)


def test_stack_keeps_every_part():
    parts = [random_matrix(form, 32, 64) for form in (INT4, INT4_FLOAT, INT8, INT8_FLOAT)]
    whole = torch.cat([p.dense(torch.float32) for p in parts])
    for some, form in ((parts, INT8_FLOAT), (parts[:2], INT4_FLOAT), (parts[:1] * 2, INT4)):
        got = stack(some, torch.float32)
        assert isinstance(got, QuantisedMatrix) and got.format is form
        assert torch.equal(got.dense(torch.float32), torch.cat([p.dense(torch.float32) for p in some]))
    assert torch.equal(stack([*parts, torch.ones(3, 64)], torch.float32), torch.cat([whole, torch.ones(3, 64)]))
    odd = random_matrix(INT8, 5, 64)
    assert torch.equal(stack([odd, odd], torch.float32), odd.dense(torch.float32).repeat(2, 1))


def test_fitting_format_is_the_smallest_that_keeps_the_scales():
    half, odd = torch.tensor([[0.5, 3.0]]), torch.tensor([[0.1, 1e-9]])
    assert fitting_format(half, half, 4, 32) is INT4
    assert fitting_format(half, odd, 4, 32) is INT4_FLOAT
    assert fitting_format(half, None, 8, 32) is INT8
    assert fitting_format(odd, None, 8, 32) is fitting_format(half, half, 8, 32) is INT8_FLOAT
    assert fitting_format(half, None, 8, 16) is INT8_FLOAT
