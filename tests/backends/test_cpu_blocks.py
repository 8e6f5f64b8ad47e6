"""Products with matrices in blocks against fp64, and models made of them against torch."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from bdcli.backends.select import pick_backend, torch_backend
from bdcli.base.progress import SILENT
from bdcli.cache.selection import Full
from bdcli.model.quantised import FORMATS
from tests.support.backends import drafter
from tests.support.compiled import FRESH, SHAPES, entry, force, randn
from tests.support.models import tiny_model
from tests.support.quantised import in_blocks, random_matrix

NAMED = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
DIGITS = {2: 2**-14, 3: 2**-21}  # of x that are kept: the error of a number, in parts of the largest of 32


@functools.cache
def packer():
    """Packs 32 floats at one address into another."""
    from numba import types

    from bdcli.backends.cpu.blocks import pack_blocks
    from bdcli.backends.cpu.machine.simd import entries, get, machine_code

    def pack_32_floats(kind, source, into):
        pack_blocks(kind, into, get(source), get(source + 64))

    machine_code(types.void, *[types.int64] * 3)(pack_32_floats)
    return entries["pack_32_floats"].ctypes


def packed(kind: int, x: torch.Tensor) -> torch.Tensor:
    """Rows x [T, inputs] as the products read them."""
    into = torch.zeros_like(x)
    for at in range(0, 4 * x.numel(), 128):
        packer()(kind, x.data_ptr() + at, into.data_ptr() + at)
    return into


def product(matrix, digits: int, x: torch.Tensor) -> torch.Tensor:
    from bdcli.backends.cpu.blocks import kind_of_format

    kind = kind_of_format(matrix.format, digits)
    y, corner = torch.zeros(x.shape[0], matrix.rows), torch.zeros(16, 64)
    x = packed(kind, x)
    shape = matrix.inputs, x.data_ptr(), x.shape[0], y.data_ptr(), 4 * matrix.rows, matrix.rows, corner.data_ptr()
    entry("linear_blocks")(kind, matrix.data.data_ptr(), *shape)
    return y


@NAMED
@pytest.mark.parametrize("digits", DIGITS)
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 16, 32), (2, 5, 64), (3, 37, 96), (9, 64, 32), (33, 80, 160)]
)
def test_products_equal_those_of_fp64(form, digits, rows, outputs, inputs):
    matrix, x = random_matrix(form, outputs, inputs), randn(rows, inputs)
    x[:, 32:] *= 1e-3  # blocks of other sizes have steps of their own
    weights = matrix.dense(torch.float64)
    got = product(matrix, digits, x)
    error = (got - x.double() @ weights.T).abs()
    step = x.view(rows, -1, 32).abs().amax(-1).repeat_interleave(32, 1).double()
    assert (error <= (DIGITS[digits] + 2**-21) * (step @ weights.abs().T) + 1e-9).all()


@NAMED
@pytest.mark.parametrize("digits", DIGITS)
def test_a_row_is_the_same_alone_and_among_others(form, digits):
    matrix, x = random_matrix(form, 53, 128), randn(21, 128)
    many = product(matrix, digits, x)
    for r in range(len(x)):
        assert torch.equal(product(matrix, digits, x[r : r + 1].clone())[0], many[r])


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_does_not_become_a_number(wrong):
    matrix, x = random_matrix(FORMATS[0], 32, 64), randn(2, 64)
    x[1, 40] = wrong
    got = product(matrix, 2, x)
    assert got[0].isfinite().all() and got[1].isnan().all()


def test_zeros_give_zeros():
    assert torch.equal(product(random_matrix(FORMATS[2], 17, 64), 2, torch.zeros(1, 64)), torch.zeros(1, 17))


@NAMED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"D{s['dim']}")
def test_forwards_equal_torchs(shape, form, dtype, monkeypatch):
    """fp32 to fp32's rounding; in bf16 the compiled step is nearer to fp32 than torch's bf16 step is."""
    force(monkeypatch, "vectors")
    model = in_blocks(tiny_model(**shape, seed=2, dtype=dtype), form)
    exact = replace(model, layers=[x.dense(torch.float32) for x in model.layers], norm=model.norm.float())
    ids = torch.randint(model.config.vocab_size, (110,), generator=FRESH).tolist()
    fast = drafter(pick_backend("compiled", [model], SILENT), model, Full(), 130).runner
    plain, truth = (drafter(torch_backend(), m, Full(), 130).runner for m in (model, exact))
    errors, floor = [], []
    for each in (fast, plain, truth):
        each.prefill(ids[:40])
    for at, rows in ((40, 1), (41, 3), (44, 9), (53, 2), (55, 33), (88, 1)):
        got, torchs, want = (each.feed(ids[at : at + rows], rows) for each in (fast, plain, truth))
        errors.append((got - want).square().mean())
        floor.append((torchs - want).square().mean())
    error, floor = (torch.stack(x).mean().sqrt() / want.std() for x in (errors, floor))
    assert error < (2e-5 if dtype is torch.float32 else 2 * floor)
