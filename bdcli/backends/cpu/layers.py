"""What happens to rows of floats between attentions: linear layers, norms, rotations, embeddings, the gated MLP.

A *packed* row has the layout that its product reads: for `products.rows_dot` and bf16 weights each 32 floats are the 16
even ones, then the 16 odd ones, for its dot products bf16 in order; for `amx.tile_rows` see `amx.pack_tiles`; for
`blocks.blocks_dot` see there. Strides are bytes.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, types

from bdcli.backends.cpu import tables
from bdcli.backends.cpu.amx import TILE_ROWS, pack_tiles, tile_rows
from bdcli.backends.cpu.blocks import (
    FIRST_KIND,
    embed_block_row,
    linear_blocks,
    pack_blocks,
    panel_bytes,
)
from bdcli.backends.cpu.machine.simd import (
    evens,
    get,
    get_bf16,
    get_i64,
    machine_code,
    odds,
    put,
    put_narrow,
    spread,
    total,
    vexp,
    vfma,
    vmax,
)
from bdcli.backends.cpu.products import DOTS, FLOATS, MAX_ROWS, PAIRS, TILES, rows_dot
from bdcli.backends.cpu.tables import field, number


@njit(error_model="numpy")
def kind_of(model, stored, product):
    """How the product of that BY_TILES bit is made with a matrix, or cache, that is `stored` so."""
    return TILES if stored < FIRST_KIND and field(model, tables.TILED) & product else stored


@njit(error_model="numpy")
def size_of(kind):
    """Bytes of a number of a dense matrix or a cache."""
    return 4 if kind == FLOATS else 2


@njit(error_model="numpy")
def row_at(kind, weight, row, width):
    """Address of a row of a matrix; of its panel, which it must begin, for matrices in blocks."""
    if kind >= FIRST_KIND:
        return weight + row // 16 * panel_bytes(kind, width)
    return weight + row * width * size_of(kind)


@njit(error_model="numpy")
def packed_row(kind, width):
    """Bytes of a packed row."""
    return (2 if kind == DOTS else 4) * width


@machine_code(types.void, *[types.int64] * 9)
def linear(kind, weight, width, x, rows, y, y_row, columns, corner):
    """y[r, c] of `rows` packed rows x of `width` floats and `columns` rows of `weight`. Strides of y in bytes."""
    if kind >= FIRST_KIND:
        linear_blocks(kind, weight, width, x, rows, y, y_row, columns, corner)
        return
    row_bytes, x_row, first = width * size_of(kind), packed_row(kind, width), 0
    if kind == TILES:
        while first < rows:
            count = min(rows - first, TILE_ROWS)
            x_block, y_block = x + first * x_row, y + first * y_row
            tile_rows(count, rows == 1, weight, row_bytes, x_block, y_block, y_row, columns, width // 32, corner)
            first += count
        return
    shape = (columns << 32) | (row_bytes // 64)
    blocks = -(-rows // MAX_ROWS)
    for i in range(blocks):
        count = (rows - first) // (blocks - i)
        rows_dot(count, kind, weight, row_bytes, x + first * x_row, x_row, y + first * y_row, y_row, shape)
        first += count


@njit(error_model="numpy")
def pack(kind, base, row, width, first, a, b):
    """Store 32 floats of a row of `width`, from number `first` on, the way the product of that kind reads them."""
    if kind == TILES:
        pack_tiles(base, row, width, first, a, b)
        return
    if kind == DOTS:
        put_narrow(base + 2 * (row * width + first), a, b)
        return
    if kind >= FIRST_KIND:
        pack_blocks(kind, base + 4 * (row * width + first), a, b)
        return
    at = base + 4 * (row * width + first)
    put(at, evens(a, b) if kind == PAIRS else a)
    put(at + 64, odds(a, b) if kind == PAIRS else b)


@njit(error_model="numpy")
def inverse_root(x):
    return spread(np.float32(1) / np.float32(math.sqrt(x)))


@machine_code(types.void, *[types.int64] * 6)
def normed(model, x, rows, weight, out, kind):
    """RMSNorm (Zhang & Sennrich 2019) of rows [rows, HIDDEN], packed into `out` for a product of `kind`."""
    hidden = field(model, tables.HIDDEN)
    for r in range(rows):
        row = x + 4 * r * hidden
        squares = spread(np.float32(0))
        for i in range(0, 4 * hidden, 64):
            squares = vfma(get(row + i), get(row + i), squares)
        factor = spread(
            np.float32(1) / np.float32(math.sqrt(total(squares) / np.float32(hidden) + number(model, tables.EPS)))
        )
        for i in range(0, 4 * hidden, 128):
            a, b = get(row + i) * factor * get(weight + i), get(row + i + 64) * factor * get(weight + i + 64)
            pack(kind, out, r, hidden, i // 4, a, b)


@njit(error_model="numpy")
def add_bias(y, rows, y_row, bias, columns):
    """`bias` is 0, or the address of `columns` floats, a multiple of 16."""
    if bias != 0:
        for r in range(rows):
            for i in range(0, 4 * columns, 64):
                put(y + r * y_row + i, get(y + r * y_row + i) + get(bias + i))


@machine_code(types.void, *[types.int64] * 5)
def embed(model, call, thread, rows, tokens):
    """Embedding rows of the tokens into X; rows are shared out between the threads."""
    hidden, threads, kind = (
        field(model, tables.HIDDEN),
        field(call, tables.THREADS),
        field(model, tables.EMBEDDING_KIND),
    )
    table = field(model, tables.EMBEDDING)
    for r in range(thread, rows, threads):
        token, into = get_i64(tokens + 8 * r), field(call, tables.X) + 4 * r * hidden
        if kind >= FIRST_KIND:
            embed_block_row(kind, table, hidden, token, into)
            continue
        for i in range(0, hidden, 16):
            if kind != FLOATS:
                put(into + 4 * i, get_bf16(table + 2 * (token * hidden + i)))
            else:
                put(into + 4 * i, get(table + 4 * (token * hidden + i)))


@njit(error_model="numpy")
def rotate(model, source, position, into, scale):
    """A head of D floats, rotated to `position` and scaled; `source` may be `into`."""
    half = field(model, tables.DIM) // 2
    cos, sin = field(model, tables.COS) + 4 * position * half, field(model, tables.SIN) + 4 * position * half
    factor = spread(scale)
    for i in range(0, 4 * half, 64):
        a, b = get(source + i), get(source + 4 * half + i)
        c, s = get(cos + i) * factor, get(sin + i) * factor
        put(into + i, a * c - b * s)
        put(into + 4 * half + i, vfma(b, c, a * s))


@njit(error_model="numpy")
def norm_heads(model, y, rows, weight):
    dim = field(model, tables.DIM)
    for r in range(rows):
        one = y + 4 * r * dim
        squares = spread(np.float32(0))
        for i in range(0, 4 * dim, 64):
            squares = vfma(get(one + i), get(one + i), squares)
        factor = inverse_root(total(squares) / np.float32(dim) + number(model, tables.EPS))
        for i in range(0, 4 * dim, 64):
            put(one + i, get(one + i) * factor * get(weight + i))


@machine_code(types.void, *[types.int64] * 10)
def add_linear(model, call, own, rows, width, weight, bias, x, tile, kind):
    """X += one tile of a linear layer onto HIDDEN columns."""
    hidden, first = field(model, tables.HIDDEN), tile * 16
    y, corner = own + field(call, tables.TILE), own + field(call, tables.CORNER)
    linear(kind, row_at(kind, weight, first, width), width, x, rows, y, 64, 16, corner)
    if bias != 0:
        add_bias(y, rows, 64, bias + 4 * first, 16)
    for r in range(rows):
        at = field(call, tables.X) + 4 * (r * hidden + first)
        put(at, get(at) + get(y + 64 * r))


@njit(error_model="numpy")
def silu(x):
    return x / (spread(np.float32(1)) + vexp(spread(np.float32(0)) - vmax(x, spread(np.float32(-87)))))


@machine_code(types.void, *[types.int64] * 6)
def gate(model, layer, call, own, rows, tile):
    """silu(gate) · up of 32 columns, packed into GATED."""
    hidden, inner = field(model, tables.HIDDEN), field(model, tables.INNER)
    kind = kind_of(model, field(layer, tables.GATE_UP_KIND), tables.GATE_UP_TILES)
    then = kind_of(model, field(layer, tables.DOWN_KIND), tables.DOWN_TILES)
    y, corner = own + field(call, tables.TILE), own + field(call, tables.CORNER)
    x, first = own + field(call, tables.NARROW), 32 * tile
    for side in range(2):
        at = side * inner + first
        weight = row_at(kind, field(layer, tables.GATE_UP), at, hidden)
        linear(kind, weight, hidden, x, rows, y + 128 * side, 256, 32, corner)
        if field(layer, tables.GATE_UP_BIAS) != 0:
            add_bias(y + 128 * side, rows, 256, field(layer, tables.GATE_UP_BIAS) + 4 * at, 32)
    for r in range(rows):
        row = y + 256 * r
        a, b = silu(get(row)), silu(get(row + 64))
        pack(then, field(call, tables.GATED), r, inner, first, a * get(row + 128), b * get(row + 192))
