"""What happens to a prompt's rows between products, compiled, against its torch twin."""

from __future__ import annotations

import pytest
import torch

from bdcli.model.llama import RowOperations
from bdcli.model.quantised import FORMATS
from tests.support.cli import compiled_only
from tests.support.compiled import randn
from tests.support.quantised import random_matrix

pytestmark = compiled_only


def compiled():
    from bdcli.backends.cpu.prompt.rows import CompiledRows

    return CompiledRows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 32), (2, 96), (17, 576), (513, 64)])
def test_rows_equal_their_twin_on_any_number_of_threads(rows, width, dtype):
    x, weight, both = 3 * randn(rows, width).to(dtype), randn(width).to(dtype), 9 * randn(rows, 2 * width).to(dtype)
    wide = x.double(), weight.double()
    wanted = wide[0] * (wide[0].square().mean(-1, keepdim=True) + 1e-5).rsqrt() * wide[1]
    gate, up = both.double().chunk(2, -1)
    near = {"atol": 1e-6, "rtol": 2e-6} if dtype is torch.float32 else {"atol": 1e-6, "rtol": 2**-8}
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((compiled().norm(x, weight, 1e-5), compiled().gate(both)))
    finally:
        torch.set_num_threads(before)
    for normed, gated in found:
        assert torch.equal(normed, found[0][0]) and torch.equal(gated, found[0][1])
    torch.testing.assert_close(found[0][0].double(), wanted, **near)
    torch.testing.assert_close(found[0][1].double(), gate * gate.sigmoid() * up, **near)
    loose = {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.02, "rtol": 0.02}
    torch.testing.assert_close(found[0][0], RowOperations.norm(x, weight, 1e-5), **loose)
    torch.testing.assert_close(found[0][1], RowOperations.gate(both), **loose)


def test_rows_that_lie_apart_are_refused():
    with pytest.raises(RuntimeError, match="strides"):
        compiled().norm(randn(4, 64)[:, ::2], randn(32), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_matrices_in_blocks_are_dense_bit_for_bit(form, dtype):
    for rows, inputs in ((1, 32), (37, 96), (64, 160)):
        matrix = random_matrix(form, rows, inputs)
        assert torch.equal(compiled().dense(matrix, dtype), matrix.dense(dtype))
