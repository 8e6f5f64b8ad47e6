"""Products of compiled steps against plain maths, whatever the rows."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.cli import compiled_only
from tests.support.compiled import KINDS, entry, force, randn

pytestmark = compiled_only

# -- the two products


def kind_for(w, x):
    """Rows of bf16 are for dot products."""
    from bdcli.backends.cpu.products import DOTS, FLOATS, PAIRS

    return FLOATS if w.dtype is torch.float32 else DOTS if x.dtype is torch.bfloat16 else PAIRS


def rows_dot(w, x):
    packed = x if x.dtype is w.dtype else x.view(len(x), -1, 16, 2).transpose(2, 3).contiguous()
    y, size, width = torch.full((len(x), len(w)), torch.nan), w.element_size(), w.shape[1]
    shape = (len(w) << 32) | (width * size // 64)
    places = w.data_ptr(), width * size, packed.data_ptr(), x[0].nbytes, y.data_ptr(), 4 * len(w)
    entry("rows_dot")(len(x), kind_for(w, x), *places, shape)
    return y


def scores(keys, x):
    """x [R, D] against keys [S, D] through key panels."""
    from bdcli.backends.cpu.caches import key_panels

    panels, y = key_panels(keys).contiguous(), torch.zeros(len(x), len(keys))
    pair, dim = 2 if keys.dtype is torch.bfloat16 else 1, keys.shape[1]
    shape = (len(keys) // 16 << 32) | (dim // pair)
    places = panels.data_ptr(), 64, panels[0].nbytes, x.data_ptr(), x[0].nbytes, y.data_ptr(), 4 * len(keys)
    entry("panels")(len(x), kind_for(keys, x), *places, shape, 0)
    return y


def tile_rows(w, x):
    """Packed by hand: for each 32 numbers 16 pairs of high parts of all rows, then of low ones."""
    from bdcli.backends.cpu.amx import tile_configs

    columns, width = w.shape
    high = x.bfloat16()
    parts = torch.stack((high, (x - high.float()).bfloat16()))
    packed = torch.zeros(width // 32, 2, 16, 16, 2, dtype=torch.bfloat16)
    packed[:, :, :, : len(x)] = parts.view(2, len(x), width // 32, 16, 2).permute(2, 0, 3, 1, 4)
    y, corner, config = torch.full((len(x), columns), torch.nan), torch.zeros(1024), tile_configs()
    room = -(-corner.data_ptr() // 64) * 64
    entry("shape_tiles")(config.ctypes.data + 64 * (len(x) - 1))
    places = w.data_ptr(), 2 * width, packed.data_ptr(), y.data_ptr(), 4 * columns, columns, width // 32, room
    entry("tile_rows")(len(x), len(x) == 1, *places)
    entry("end_tiles")()
    return y


def tile_scores(keys, x):
    from bdcli.backends.cpu.amx import tile_configs
    from bdcli.backends.cpu.caches import key_panels

    panels, dim, config = key_panels(keys).contiguous(), keys.shape[1], tile_configs()
    high, y = x.bfloat16(), torch.zeros(16, len(keys))
    split = torch.zeros(16, 2, dim, dtype=torch.bfloat16)
    split[: len(x)] = torch.stack((high, (x - high.float()).bfloat16()), 1)
    shape = (len(keys) // 16 << 32) | (dim // 32)
    places = panels.data_ptr(), 64, 1024, 32 * dim, y.data_ptr(), 4 * len(keys)
    entry("shape_tiles")(config.ctypes.data + 64 * (15 + len(x)))
    entry("tile_panels")(split.data_ptr(), 4 * dim, 2 * dim, *places, shape)
    entry("end_tiles")()
    return y[: len(x)]


def test_tiles_equal_plain_maths_whatever_the_rows(monkeypatch):
    force(monkeypatch, "tiles")
    for product, columns, width in (
        (tile_rows, 37, 32),
        (tile_rows, 80, 704),
        (tile_scores, 48, 96),
        (tile_scores, 16, 32),
    ):
        w, x = randn(columns, width).bfloat16(), randn(16, width)
        wanted = x.double() @ w.double().T
        together = product(w, x)
        assert (together - wanted).abs().max() < 1e-5 * wanted.abs().max() * math.sqrt(width)
        for rows in range(1, 16):
            assert torch.equal(product(w, x[:rows].contiguous()), together[:rows])


@pytest.mark.parametrize(("dtype", "units"), KINDS[:3], ids=str)
def test_products_equal_plain_maths_whatever_the_rows(dtype, units, monkeypatch):
    from bdcli.backends.cpu.products import MAX_ROWS

    force(monkeypatch, units)
    for product, columns, width in ((rows_dot, 37, 32), (rows_dot, 5, 704), (scores, 48, 96), (scores, 16, 32)):
        w, x = randn(columns, width).to(dtype), randn(MAX_ROWS, width)
        x = x.bfloat16() if units == "dots" else x
        wanted = x.double() @ w.double().T
        together = product(w, x)
        assert (together - wanted).abs().max() < 1e-5 * wanted.abs().max() * math.sqrt(width)
        for rows in range(1, len(together)):  # bit for bit: a row does not know how many it is computed with
            assert torch.equal(product(w, x[:rows].contiguous()), together[:rows])


def test_exponential_and_rounding():
    x = -torch.cat((randn(1000).abs() * 20, torch.tensor([0.0, 1e-30, 86.9, 87.1, 1e30, torch.inf])))
    q = x.clone()
    entry("soften")(q.data_ptr(), len(q), -math.inf)
    wanted = torch.where(x < -87, 0, x.double().exp())
    assert ((q - wanted).abs() <= 3e-7 * wanted + 1e-37).all()
