"""Two register-blocked products that the whole engine is made of, for 1 to 9 rows at a time.

    rows_dot     y[r, n] = Σ_k W[n, k] x[r, k]       W row-major as in a checkpoint: every linear layer and the lm head
    panels       y[r, j] += Σ_s P[s, j] x[r, s]      P in panels of 16 columns: scores from keys, outputs from values

What makes a value, and in which order, never depends on how many rows are computed together: one row alone gives bit
for bit what it gives among others. So verifying many tokens at once writes exactly the text of plain decoding, in
every dtype.

`kind` says how numbers are stored and multiplied:
    FLOATS  floats
    PAIRS   bf16 pairs, widened to floats by a shift and a mask; x stays float
    DOTS    bf16 pairs, multiplied by the processor's dot product of such pairs; x is rounded to bf16, as in torch
    TILES   bf16 pairs that the processor's matrix tiles multiply: the products of `tiles`, not of this file
A *step* is what one multiplication takes of W or P: 64 bytes, 16 floats or 16 pairs.
"""

from __future__ import annotations

import itertools

from numba import types
from numba.core import cgutils

from bdcli.backends.cpu.machine.llvm import (
    F32,
    F32S,
    HAS_DOTS,
    I32,
    I32S,
    I64,
    WIDE,
    ask,
    constant,
    dot,
    fma,
    load,
    pointer,
    splat,
    tree,
    widen_pairs,
)
from bdcli.backends.cpu.machine.simd import compiled, machine_code

FLOATS, PAIRS, DOTS, TILES = range(4)
KINDS = (FLOATS, PAIRS, DOTS) if HAS_DOTS else (FLOATS, PAIRS)  # of this file, here
MAX_ROWS = 9 if WIDE else 8  # nine: a draft of eight and the token before it; beyond, LLVM spills registers
WIDE_ROWS, WIDE_COLUMNS = 6, (4, 2, 1) if WIDE else (1,)  # sums of `wide_panels` in registers: 24 of 32, 12 of 16
STEP_BYTES = 64
AHEAD = 4096  # bytes of weights that are asked for before they are needed


def _columns(rows: int) -> int:
    """Weight rows, or panels, that share the registers with `rows` rows of x."""
    if WIDE:
        return 4 if rows <= 4 else 2
    return 2 if rows <= 2 else 1


def _multiply(builder, kind, sums, weights, x):
    """sums[r][n] += weights[n] · x[r]; x[r] in as many parts as a step of weights makes."""
    add = dot if kind == DOTS else fma
    for n, w in enumerate(weights):
        parts = widen_pairs(builder, w) if kind == PAIRS else (w,)
        for row, values in zip(sums, x):
            total = builder.load(row[n], typ=F32S)
            for part, value in zip(parts, values):
                total = add(builder, part, value, total)
            builder.store(total, row[n])


def _by_rows_and_kind(builder, rows, kind, count, some):
    """Code for each row count and kind, entered by a switch: inside, both are constants.

    `some(rows, kind, columns, first)` makes that many of the `count` columns; they are made in groups, then one by one.
    """
    done = builder.append_basic_block("done")
    switch = builder.switch(builder.add(builder.mul(kind, I64(MAX_ROWS + 1)), rows), done)
    for each, many in itertools.product(KINDS, range(1, MAX_ROWS + 1)):
        block = builder.append_basic_block(f"rows{many}kind{each}")
        switch.add_case(I64(each * (MAX_ROWS + 1) + many), block)
        builder.position_at_end(block)
        group = _columns(many)
        whole = builder.mul(builder.udiv(count, I64(group)), I64(group))
        for first, stop, columns in ((I64(0), whole, group), (whole, count, 1)):
            with cgutils.for_range_slice(builder, first, stop, I64(columns), intp=I64) as (at, _):
                some(many, each, columns, at)
        builder.branch(done)
    builder.position_at_end(done)


def _accumulators(builder, rows, columns):
    return [[cgutils.alloca_once(builder, F32S) for _ in range(columns)] for _ in range(rows)]


def offset_by(builder, base, *terms):
    for count, size in terms:
        base = builder.add(base, builder.mul(count if not isinstance(count, int) else I64(count), size))
    return base


@compiled(types.void, *[types.int64] * 9)
def _rows_dot(builder, rows, kind, w, w_row, x, x_row, y, y_row, shape):
    count, steps = builder.lshr(shape, I64(32)), builder.and_(shape, I64(0xFFFFFFFF))

    def some(rows, kind, columns, first):
        sums = _accumulators(builder, rows, columns)
        for row in sums:
            for total in row:
                builder.store(constant(0.0), total)
        word = F32S if kind == FLOATS else I32S
        x_step = 128 if kind == PAIRS else 64
        start = offset_by(builder, w, (first, w_row))
        with cgutils.for_range(builder, steps) as loop:
            at = builder.add(start, builder.mul(loop.index, I64(STEP_BYTES)))
            for n in range(columns):
                ask(builder, offset_by(builder, builder.add(at, I64(AHEAD)), (n, w_row)))
            weights = [load(builder, offset_by(builder, at, (n, w_row)), word) for n in range(columns)]
            from_x = builder.add(x, builder.mul(loop.index, I64(x_step)))
            values = []
            for r in range(rows):
                here = offset_by(builder, from_x, (r, x_row))
                more = [load(builder, builder.add(here, I64(64)), F32S)] if kind == PAIRS else []
                values.append([load(builder, here, I32S if kind == DOTS else F32S), *more])
            _multiply(builder, kind, sums, weights, values)
        for r, row in enumerate(sums):
            for n, total in enumerate(row):
                value = tree(builder, builder.load(total, typ=F32S), builder.fadd)
                place = offset_by(builder, y, (r, y_row), (builder.add(first, I64(n)), I64(4)))
                builder.store(value, pointer(builder, place), align=4)

    _by_rows_and_kind(builder, rows, kind, count, some)


@compiled(types.void, *[types.int64] * 11)
def _panels(builder, rows, kind, p, p_step, p_panel, x, x_row, y, y_row, shape, ahead):
    count, steps = builder.lshr(shape, I64(32)), builder.and_(shape, I64(0xFFFFFFFF))

    def some(rows, kind, columns, first):
        sums = _accumulators(builder, rows, columns)
        places = [
            [offset_by(builder, y, (r, y_row), (builder.add(first, I64(j)), I64(64))) for j in range(columns)]
            for r in range(rows)
        ]
        for row, at in zip(sums, places):
            for total, place in zip(row, at):
                builder.store(load(builder, place, F32S, 4), total)
        word = F32S if kind == FLOATS else I32S
        start = offset_by(builder, p, (first, p_panel))
        with cgutils.for_range(builder, steps) as loop:
            at = builder.add(start, builder.mul(loop.index, p_step))
            for j in range(columns):
                ask(builder, offset_by(builder, builder.add(at, ahead), (j, p_panel)))
            weights = [load(builder, offset_by(builder, at, (j, p_panel)), word) for j in range(columns)]
            from_x = builder.add(x, builder.mul(loop.index, I64(8 if kind == PAIRS else 4)))
            values = []
            for r in range(rows):
                here = offset_by(builder, from_x, (r, x_row))
                more = [load(builder, builder.add(here, I64(4)), F32, 4)] if kind == PAIRS else []
                one = load(builder, here, I32 if kind == DOTS else F32, 4)
                values.append([splat(builder, v) for v in (one, *more)])
            _multiply(builder, kind, sums, weights, values)
        for row, at in zip(sums, places):
            for total, place in zip(row, at):
                builder.store(builder.load(total, typ=F32S), pointer(builder, place), align=4)

    _by_rows_and_kind(builder, rows, kind, count, some)


def _wide(zeros):
    """Compiled code for `panels` of WIDE_ROWS rows, whose y starts from 0 or from what it is."""

    def emit(builder, dots, p, p_step, p_panel, x, x_row, y, y_row, count, steps):
        done = builder.append_basic_block("done")
        switch = builder.switch(dots, done)
        for kind in (FLOATS, DOTS) if HAS_DOTS else (FLOATS,):
            block = builder.append_basic_block(f"kind{kind}")
            switch.add_case(I64(kind), block)
            builder.position_at_end(block)
            first = I64(0)
            for columns in WIDE_COLUMNS:  # as many groups of the widest as fit, then narrower ones
                stop = builder.and_(count, I64(-columns))
                with cgutils.for_range_slice(builder, first, stop, I64(columns), intp=I64) as (at, _):
                    some(kind, columns, at, builder, p, p_step, p_panel, x, x_row, y, y_row, steps)
                first = stop
            builder.branch(done)
        builder.position_at_end(done)

    def some(kind, columns, first, builder, p, p_step, p_panel, x, x_row, y, y_row, steps):
        sums, word = _accumulators(builder, WIDE_ROWS, columns), I32S if kind == DOTS else F32S
        at_y = offset_by(builder, y, (first, I64(64)))
        places = [
            [offset_by(builder, at_y, (r, y_row), (j, I64(64))) for j in range(columns)] for r in range(WIDE_ROWS)
        ]
        for row, at in zip(sums, places):
            for total, place in zip(row, at):
                builder.store(constant(0.0) if zeros else load(builder, place, F32S, 4), total)
        start = offset_by(builder, p, (first, p_panel))
        with cgutils.for_range(builder, steps) as loop:
            at = builder.add(start, builder.mul(loop.index, p_step))
            weights = [load(builder, offset_by(builder, at, (j, p_panel)), word, 4) for j in range(columns)]
            from_x = builder.add(x, builder.mul(loop.index, I64(4)))
            for r in range(WIDE_ROWS):
                one = load(builder, offset_by(builder, from_x, (r, x_row)), I32 if kind == DOTS else F32, 4)
                _multiply(builder, kind, [sums[r]], weights, [[splat(builder, one)]])
        for row, at in zip(sums, places):
            for total, place in zip(row, at):
                builder.store(builder.load(total, typ=F32S), pointer(builder, place), align=4)

    return compiled(types.void, *[types.int64] * 10)(emit)


wide_panels, more_wide_panels = _wide(True), _wide(False)


@machine_code(types.void, *[types.int64] * 9)
def rows_dot(rows, kind, w, w_row, x, x_row, y, y_row, shape):
    """y[r, n] for n < shape >> 32 and k over (shape & 0xffffffff) steps. `*_row` are bytes between rows.

    x is float, for DOTS bf16; for PAIRS each 32 of it are the 16 even ones, then the 16 odd ones.
    """
    _rows_dot(rows, kind, w, w_row, x, x_row, y, y_row, shape)


@machine_code(types.void, *[types.int64] * 11)
def panels(rows, kind, p, p_step, p_panel, x, x_row, y, y_row, shape, ahead):
    """y[r, 16 j + lane] += Σ_s over shape >> 32 panels j and (shape & 0xffffffff) steps s; y is float.

    Panel j's step s lies at p + j·p_panel + s·p_step: 16 floats, or 16 bf16 pairs whose halves belong to two
    neighbouring values of x, which is float, for DOTS bf16. `ahead` is how many bytes beyond each step its successor
    in another call lies: it is asked for early, because memory should work while this call multiplies.
    """
    _panels(rows, kind, p, p_step, p_panel, x, x_row, y, y_row, shape, ahead)
