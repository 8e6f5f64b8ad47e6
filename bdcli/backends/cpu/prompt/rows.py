"""What happens to a prompt's rows between products that torch makes, and to weights in blocks before them, compiled."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from bdcli.backends.cpu.blocks import kind_of_format
from bdcli.backends.cpu.layers import inverse_root, silu
from bdcli.backends.cpu.machine.simd import (
    entries,
    fetch_add,
    get,
    get_bf16,
    machine_code,
    put,
    put_bf16,
    spread,
    total,
    vfma,
)
from bdcli.backends.cpu.machine.threads import run_on_torch_threads
from bdcli.backends.cpu.tables import field, number
from bdcli.model.llama import RowOperations
from bdcli.model.quantised import QuantisedMatrix, Weight

ROW_FIELDS = 9
(
    COUNT,  # address of the count of tasks claimed
    ROWS,
    TASK_ROWS,
    NARROW,  # 1: everything is bf16, 0: floats
    WIDTH,  # numbers of a row that is made
    SOURCE,  # address of whole rows, side by side
    WEIGHT,
    RESULT,
    EPS_OF_NORM,  # float
) = range(ROW_FIELDS)


@njit(inline="always")
def get_wide(narrow, at):
    """Sixteen numbers as floats."""
    return get_bf16(at) if narrow != 0 else get(at)


@njit(inline="always")
def put_as(narrow, at, x):
    """Sixteen floats as numbers of that kind."""
    if narrow != 0:
        put_bf16(at, x)
    else:
        put(at, x)


@njit(error_model="numpy")
def norm_row(job, source, result):
    narrow, width = field(job, NARROW), field(job, WIDTH)
    size = 4 - 2 * narrow
    a = b = spread(np.float32(0))
    for i in range(0, width, 32):
        x, y = get_wide(narrow, source + size * i), get_wide(narrow, source + size * (i + 16))
        a, b = vfma(x, x, a), vfma(y, y, b)
    factor = inverse_root(total(a + b) / np.float32(width) + number(job, EPS_OF_NORM))
    for i in range(0, size * width, size * 16):
        value = get_wide(narrow, source + i) * factor * get_wide(narrow, field(job, WEIGHT) + i)
        put_as(narrow, result + i, value)


@njit(error_model="numpy")
def gate_row(job, source, result):
    narrow, width = field(job, NARROW), field(job, WIDTH)
    size = 4 - 2 * narrow
    for i in range(0, size * width, size * 16):
        up = get_wide(narrow, source + size * width + i)
        put_as(narrow, result + i, silu(get_wide(narrow, source + i)) * up)


@machine_code(types.void, types.int64)
def norm_prompt(job):
    """RMSNorm of rows [ROWS, WIDTH]; each thread claims tasks until none is left."""
    rows, step, row = field(job, ROWS), field(job, TASK_ROWS), (4 - 2 * field(job, NARROW)) * field(job, WIDTH)
    first = step * fetch_add(field(job, COUNT), 1)
    while first < rows:
        for r in range(first, min(first + step, rows)):
            norm_row(job, field(job, SOURCE) + row * r, field(job, RESULT) + row * r)
        first = step * fetch_add(field(job, COUNT), 1)


@machine_code(types.void, types.int64)
def gate_prompt(job):
    """silu(gate) · up of rows [ROWS, 2 · WIDTH], gate first."""
    rows, step, row = field(job, ROWS), field(job, TASK_ROWS), (4 - 2 * field(job, NARROW)) * field(job, WIDTH)
    first = step * fetch_add(field(job, COUNT), 1)
    while first < rows:
        for r in range(first, min(first + step, rows)):
            gate_row(job, field(job, SOURCE) + 2 * row * r, field(job, RESULT) + row * r)
        first = step * fetch_add(field(job, COUNT), 1)


class CompiledRows(RowOperations):
    """`RowOperations` in one sweep over the rows each, on torch's threads."""

    @staticmethod
    def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
        """As `RowOperations.dense`; a matrix in blocks comes as a view whose columns lie side by side."""
        if not isinstance(weight, QuantisedMatrix):
            return weight.to(dtype)
        panels = weight.data.shape[0]
        out = torch.empty(weight.inputs, 16 * panels, dtype=dtype)
        kind, wide = kind_of_format(weight.format, 2), dtype is torch.float32
        places = weight.data.data_ptr(), weight.inputs, panels, out.data_ptr()
        entries["dense_columns"].ctypes(kind, *places, wide)
        return out.T[: weight.rows]

    @staticmethod
    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        _on_rows("norm_prompt", x, weight, out, eps)
        return out

    @staticmethod
    def gate(gate_up: Tensor) -> Tensor:
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        _on_rows("gate_prompt", gate_up, out, out, 0.0)
        return out


def _on_rows(entry: str, x: Tensor, weight: Tensor, out: Tensor, eps: float) -> None:
    if not x.is_contiguous() or x.dtype is not weight.dtype:
        raise RuntimeError(f"rows of {x.dtype} with strides {x.stride()} and weights of {weight.dtype}")
    job, threads = np.zeros(ROW_FIELDS + 1, np.int64), torch.get_num_threads()
    count, rows = job.ctypes.data + 8 * ROW_FIELDS, out.shape[0]
    places = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    task = max(1, rows // (4 * threads))
    job[:EPS_OF_NORM] = count, rows, task, x.dtype is torch.bfloat16, out.shape[1], *places
    job.view(np.float32)[2 * EPS_OF_NORM] = eps
    run_on_torch_threads(entry, job.ctypes.data, threads)
