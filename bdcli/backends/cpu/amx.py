"""The two products of `products` on the processor's matrix tiles (Intel AMX), for up to 16 rows at a time.

A tile is up to 16 rows of 64 bytes; one instruction multiplies tiles of 16 × 32 and 32 × 16 bf16 numbers into 16 × 16
floats. Rows of floats keep their precision as two bf16 numbers, x = high + low, each multiplied in turn. Sixteen rows
cost little more than one, and as in `products` a row's result never depends on the others. Asking for memory ahead, as
`products` does, was tried and only took time: the processor sees what comes.
"""

from __future__ import annotations

import ctypes
import functools
import struct

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from bdcli.backends.cpu.machine.llvm import I64, call, pointer
from bdcli.backends.cpu.machine.simd import (
    compiled,
    evens,
    get,
    get_f32,
    machine_code,
    odds,
    paired,
    put,
    put_column,
    put_f32,
    put_transposed,
    rounded,
    spread,
)
from bdcli.backends.cpu.products import offset_by

TILE_ROWS = 16
HALF = 1024  # bytes of a tile; of 16 packed rows, each 32 numbers are a tile of their high parts, then of the low ones
_ARCH_PRCTL, _ASK_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # Linux on x86-64
_I8, _VOID = ir.IntType(8), ir.VoidType()
_FEATURES = llvmlite.binding.get_host_cpu_features()
PRESENT = bool(_FEATURES.get("amx-bf16") and _FEATURES.get("amx-tile"))


@functools.cache
def available() -> bool:
    """Whether the processor has tiles for bf16 and the system lets this process use them. Asks for that."""
    return PRESENT and ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ASK_PERMISSION, _TILE_DATA) == 0


def tile_configs() -> np.ndarray:
    """What `shape_tiles` reads, 64 bytes each: sizes of the eight tiles for `tile_rows` of 1 to 16 rows, then for
    `tile_panels` of as many. Sums are tiles 0 and 1, rows of x 4 and 5, weights or panels 6 and 7.
    """
    whole, found = (TILE_ROWS, 64), []
    for rows in range(1, TILE_ROWS + 1):
        found.append(_config((TILE_ROWS, 4 * rows), (TILE_ROWS, 4 * rows), whole))
    for rows in range(1, TILE_ROWS + 1):
        found.append(_config((rows, 64), (rows, 64), whole))
    return np.frombuffer(b"".join(found), np.uint8).copy()


def _config(sums: tuple[int, int], x: tuple[int, int], weights: tuple[int, int]) -> bytes:
    """Rows and bytes a row of each kind of tile."""
    sizes = [sums, sums, whole := (TILE_ROWS, 64), whole, x, x, weights, weights]
    return struct.pack("<BB14x8H16x8B8x", 1, 0, *(width for _, width in sizes), *(rows for rows, _ in sizes))


def _tile(builder, name, *operands):
    """A tile instruction; small Python numbers are tiles. Nothing where the processor has none: it is never called."""
    if not PRESENT:
        return
    operands = [_I8(o) if isinstance(o, int) else o for o in operands]
    call(builder, f"llvm.x86.{name}", _VOID, *operands)


def _zero(builder, tile):
    _tile(builder, "tilezero", tile)


def _read(builder, tile, at, stride):
    _tile(builder, "tileloadd64", tile, pointer(builder, at), stride)


def _write(builder, tile, at, stride):
    _tile(builder, "tilestored64", tile, pointer(builder, at), stride)


def _add_product(builder, total, a, b):
    """Tile `total` += tile a [16 × 32] · tile b, 16 rows of pairs [2 of 32 × 16]."""
    _tile(builder, "tdpbf16ps", total, a, b)


def _in_twos(builder, count, some):
    """`some(columns, first)` for pairs, then for what is left."""
    whole = builder.and_(count, I64(-2))
    for first, stop, columns in ((I64(0), whole, 2), (whole, count, 1)):
        with cgutils.for_range_slice(builder, first, stop, I64(columns), intp=I64) as (at, _):
            some(columns, at)


@compiled(types.void, types.int64)
def _begin(builder, config):
    _tile(builder, "ldtilecfg", pointer(builder, config))


@compiled(types.void)
def _end(builder):
    _tile(builder, "tilerelease")


@compiled(types.void, *[types.int64] * 8)
def _row_tiles(builder, w, w_row, x, y, y_step, y_row, count, steps):
    """Transposed products of `count` groups of 16 weight rows with up to 16 rows x: [16 weight rows, 16 rows] each."""

    def some(columns, first):
        start = offset_by(builder, w, (first, builder.mul(w_row, I64(TILE_ROWS))))
        for n in range(columns):
            _zero(builder, n)
        with cgutils.for_range(builder, steps) as loop:
            from_x = builder.add(x, builder.mul(loop.index, I64(2 * HALF)))
            _read(builder, 4, from_x, I64(64))
            _read(builder, 5, builder.add(from_x, I64(HALF)), I64(64))
            for n in range(columns):
                at = offset_by(builder, start, (loop.index, I64(64)), (n * TILE_ROWS, w_row))
                _read(builder, 6 + n, at, w_row)
                _add_product(builder, n, 6 + n, 4)
                _add_product(builder, n, 6 + n, 5)
        for n in range(columns):
            _write(builder, n, offset_by(builder, y, (builder.add(first, I64(n)), y_step)), y_row)

    _in_twos(builder, count, some)


@compiled(types.void, *[types.int64] * 10)
def _panel_tiles(builder, x, x_row, low, p, p_row, p_step, p_panel, y, y_row, shape):
    count, steps = builder.lshr(shape, I64(32)), builder.and_(shape, I64(0xFFFFFFFF))

    def some(columns, first):
        start = offset_by(builder, p, (first, p_panel))
        for j in range(columns):
            _zero(builder, j)
        with cgutils.for_range(builder, steps) as loop:
            from_x = builder.add(x, builder.mul(loop.index, I64(64)))
            _read(builder, 4, from_x, x_row)
            _read(builder, 5, builder.add(from_x, low), x_row)
            for j in range(columns):
                at = offset_by(builder, start, (loop.index, p_step), (j, p_panel))
                _read(builder, 6 + j, at, p_row)
                _add_product(builder, j, 4, 6 + j)
                _add_product(builder, j, 5, 6 + j)
        for j in range(columns):
            _write(builder, j, offset_by(builder, y, (builder.add(first, I64(j)), I64(64))), y_row)

    _in_twos(builder, count, some)


def _squares(zeros):
    """Compiled code for `square_tiles`, whose y starts from 0 or from what it is."""

    def emit(builder, x, x_row, p, p_row, p_step, p_panel, y, y_row, count, steps):
        def some(columns, first):
            sums = [
                (2 * i + j, offset_by(builder, y, (i * TILE_ROWS, y_row), (builder.add(first, I64(j)), I64(64))))
                for i in range(2)
                for j in range(columns)
            ]
            for tile, at in sums:
                _zero(builder, tile) if zeros else _read(builder, tile, at, y_row)
            with cgutils.for_range(builder, steps) as loop:
                for i in range(2):
                    at = offset_by(builder, x, (i * TILE_ROWS, x_row), (loop.index, I64(64)))
                    _read(builder, 4 + i, at, x_row)
                for j in range(columns):
                    at = offset_by(builder, p, (builder.add(first, I64(j)), p_panel), (loop.index, p_step))
                    _read(builder, 6 + j, at, p_row)
                for tile, _ in sums:
                    _add_product(builder, tile, 4 + tile // 2, 6 + tile % 2)
            for tile, at in sums:
                _write(builder, tile, at, y_row)

        _in_twos(builder, count, some)

    return compiled(types.void, *[types.int64] * 10)(emit)


# y[r, 16 j + lane] (+)= Σ_s P[s, j] x[r, s] for 2 · TILE_ROWS rows of bf16, `count` panels j and `steps` times 32 of s;
# P as in `tile_panels`, tiles shaped for 16 rows of it.
square_tiles, more_square_tiles = _squares(True), _squares(False)


@machine_code(types.void, types.int64)
def shape_tiles(config):
    """Before products in a thread, and whenever their kind or number of rows changes: see `tile_configs`."""
    _begin(config)


@machine_code(types.void)
def end_tiles():
    """Release this thread's tile state."""
    _end()


@machine_code(types.void, *[types.int64] * 10)
def tile_rows(rows, alone, w, w_row, x, y, y_row, columns, steps, corner):
    """y[r, n] = Σ_k W[n, k] x[r, k] for up to 16 packed rows and `columns` rows of W, at least 16 from W's beginning.

    W is bf16 and row-major, k runs over `steps` times 32. `alone` says that tiles are shaped for one row. `corner` is
    scratch of 3 KiB, on a cache line.
    """
    done = 0
    while done < columns:
        first = min(done, columns - TILE_ROWS)  # the last group may begin among rows that are made already
        groups = 2 if columns - first >= 2 * TILE_ROWS else 1
        if alone and first == done:  # transposed or not is the same
            _row_tiles(w + first * w_row, w_row, x, y + 4 * first, 64, 4, groups, steps)
            done = first + TILE_ROWS * groups
            continue
        _row_tiles(w + first * w_row, w_row, x, corner, HALF, 64, groups, steps)
        for g in range(groups):
            tile, at = corner + HALF * g, y + 4 * (first + TILE_ROWS * g)
            if first < done:  # only what is new: another thread may be writing the rest
                for r in range(rows):
                    for n in range(done - first, TILE_ROWS):
                        put_f32(at + r * y_row + 4 * n, get_f32(tile + 64 * n + 4 * r))
            else:
                put_transposed(tile, 64, corner + 2 * HALF)
                for r in range(rows):
                    put(at + r * y_row, get(corner + 2 * HALF + 64 * r))
        done = first + TILE_ROWS * groups


@machine_code(types.void, *[types.int64] * 10)
def tile_panels(x, x_row, low, p, p_row, p_step, p_panel, y, y_row, shape):
    """y[r, 16 j + lane] = Σ_s P[s, j] x[r, s] for shape >> 32 panels j and (shape & 0xffffffff) times 32 of s.

    Rows are those that tiles are shaped for. x is bf16: a row's high parts, and `low` bytes on its low parts. P is in
    pairs of neighbouring s: those of step s and panel j lie at p + j·p_panel + s·p_step, 16 rows `p_row` bytes apart.
    """
    _panel_tiles(x, x_row, low, p, p_row, p_step, p_panel, y, y_row, shape)


@njit(error_model="numpy")
def pack_tiles(base, row, width, first, a, b):
    """32 floats of `row`, from number `first` on, into packed rows of `width` numbers at `base`."""
    at = base + row // TILE_ROWS * (4 * TILE_ROWS * width) + first // 32 * (2 * HALF) + row % TILE_ROWS * 4
    x, y = evens(a, b), odds(a, b)
    high_x, high_y = rounded(x), rounded(y)
    put_column(at, paired(high_x, high_y))
    put_column(at + HALF, paired(rounded(x - high_x), rounded(y - high_y)))


@njit(error_model="numpy")
def split_row(source, count, into, low):
    """`count` floats, a multiple of 16, as bf16: high parts at `into`, low parts `low` bytes on; zeros up to 32."""
    for i in range(0, count, 32):
        a = get(source + 4 * i)
        b = get(source + 4 * i + 64) if i + 16 < count else spread(np.float32(0))
        x, y = evens(a, b), odds(a, b)
        high_x, high_y = rounded(x), rounded(y)
        put(into + 2 * i, paired(high_x, high_y))
        put(into + 2 * i + low, paired(rounded(x - high_x), rounded(y - high_y)))
