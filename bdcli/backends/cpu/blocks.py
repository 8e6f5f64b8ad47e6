"""The product of rows with a matrix in blocks of 4-bit or 8-bit codes (`bdcli.model.quantised`), read as it is stored.

    blocks_dot   y[r, n] = Σ_b (scale[n, b] · Σ_k code[n, k] x[r, k] + offset[n, b] · Σ_k x[r, k])       k in block b

Lanes are the 16 rows of a panel. Codes are multiplied as the integers they are: x is packed as fixed-point numbers,
32 of which share a step, in *digits* of 7 bits, and each digit takes one integer product of the processor's (four codes
a lane). Sums of a block are exact, so what makes a value never depends on how many rows are computed together. Two
digits keep 15 bits of the largest of the 32 numbers, for bf16 models, whose numbers have 8; three keep 22, for floats.

Packed, 32 numbers of x take 128 bytes: their step, the sums of the first and the last 16, 4 bytes of nothing, then
digits of all of them, the lowest first.
"""

from __future__ import annotations

import itertools

import numpy as np
from numba import njit, types
from numba.core import cgutils

from bdcli.backends.cpu.machine.llvm import (
    F16S,
    F32,
    F32S,
    I8S,
    I32,
    I32S,
    I64,
    WIDE,
    ask,
    call,
    constant,
    fma,
    integer_dot,
    load,
    narrowed,
    pointer,
    splat,
    tree,
)
from bdcli.backends.cpu.machine.simd import (
    Vector,
    compiled,
    get_f16,
    get_f32,
    get_u8,
    highest,
    machine_code,
    magnitude,
    put_f32,
    spread,
    total,
    vmax,
)
from bdcli.backends.cpu.products import offset_by
from bdcli.backends.cpu.tables import X_GROUP
from bdcli.model.quantised import FORMATS, LANES, BlockFormat

FIRST_KIND = 4  # behind the kinds of `products`: 4 + 2 · format for two digits, 5 + 2 · format for three
MAX_ROWS = {2: 9, 3: 5}  # by digits: more would not fit the registers
AHEAD = 2048  # bytes of a panel that are asked for before they are needed
X_GROUP_BYTES, X_DIGITS_AT = 128, 16  # of packed x
_HIGHEST = {2: 127 * 128, 3: 127 * 128 * 128}  # by digits: the largest fixed-point number
_KINDS = {FIRST_KIND + 2 * i + digits - 2: (f, digits) for i, f in enumerate(FORMATS) for digits in (2, 3)}


def kind_of_format(form: BlockFormat, digits: int) -> int:
    return FIRST_KIND + 2 * FORMATS.index(form) + digits - 2


def _panels_together(rows: int) -> int:
    """Panels that share the registers with `rows` rows of x."""
    return 2 if WIDE and rows <= 3 else 1


def _side(builder, at, form):
    """Sixteen scales or offsets as floats."""
    if form.scale_dtype.itemsize == 4:
        return load(builder, at, F32S, 4)
    return builder.fpext(load(builder, at, F16S, 2), F32S)


def _codes(builder, form, at):
    """Unsigned codes of the next inputs, four a lane: one vector, or two of nibbles."""
    lanes = load(builder, at, I32S, 4)
    if form.bits == 8:
        return [lanes]
    low = constant(0x0F0F0F0F, I32S)
    return [builder.and_(lanes, low), builder.and_(builder.lshr(lanes, constant(4, I32S)), low)]


def _block(builder, form, digits, records, x_at, part, totals):
    """Add one block of each panel. `x_at[r]` is the packed group of x; `part` is which half of it, for blocks of 16."""
    rows, none = len(x_at), constant(0, I32S)
    sums = [[[cgutils.alloca_once(builder, I32S) for _ in range(digits)] for _ in records] for _ in range(rows)]
    for one in itertools.chain.from_iterable(itertools.chain.from_iterable(sums)):
        builder.store(none, one)
    vectors = 1 if form.bits == 8 else 2
    digits_at = [offset_by(builder, at, (part, I64(16)), (1, I64(X_DIGITS_AT))) for at in x_at]
    with cgutils.for_range(builder, I64(form.block // 4 // vectors)) as loop:
        codes = [
            _codes(builder, form, offset_by(builder, at, (loop.index, I64(64)), (1, I64(form.code_at))))
            for at in records
        ]
        for r, v, d in itertools.product(range(rows), range(vectors), range(digits)):
            at = offset_by(builder, digits_at[r], (loop.index, I64(4 * vectors)), (1, I64(4 * v + 32 * d)))
            x = splat(builder, load(builder, at, I32, 4))
            for n in range(len(records)):
                sum_ = sums[r][n][d]
                builder.store(integer_dot(builder, builder.load(sum_, typ=I32S), codes[n][v], x), sum_)
    for n, at in enumerate(records):
        scale = _side(builder, at, form)
        offset = _side(builder, builder.add(at, I64(form.scale_bytes)), form) if form.offsets else None
        if form.bits == 8:  # codes are stored with a bias
            bias = builder.fmul(scale, constant(-128.0))
            offset = bias if offset is None else builder.fadd(offset, bias)
        for r in range(rows):
            value = builder.sitofp(builder.load(sums[r][n][-1], typ=I32S), F32S)
            for d in reversed(range(digits - 1)):
                low = builder.sitofp(builder.load(sums[r][n][d], typ=I32S), F32S)
                value = fma(builder, value, constant(128.0), low)
            step = splat(builder, load(builder, x_at[r], F32, 4))
            value = fma(builder, scale, builder.fmul(value, step), builder.load(totals[r][n], typ=F32S))
            if offset is not None:
                value = fma(builder, offset, splat(builder, _sum_of_x(builder, form, x_at[r], part)), value)
            builder.store(value, totals[r][n])


def _sum_of_x(builder, form, at, part):
    """Sum of the block's inputs, from those of 16."""
    first = load(builder, offset_by(builder, at, (part, I64(4)), (1, I64(4))), F32, 4)
    return first if form.block == 16 else builder.fadd(first, load(builder, builder.add(at, I64(8)), F32, 4))


def _in_groups(builder, rows, count, some):
    """`some(panel, panels)` for `count` panels, in groups and then one by one."""
    group = _panels_together(rows)
    whole = builder.mul(builder.udiv(count, I64(group)), I64(group))
    for first, stop, many in ((I64(0), whole, group), (whole, count, 1))[:group]:
        with cgutils.for_range_slice(builder, first, stop, I64(many), intp=I64) as (at, _):
            some(at, many)


def _body(builder, rows, form, digits, w, width, x, y, y_row, count):
    """`blocks_dot` where rows and kind are constants."""
    blocks = builder.udiv(width, I64(form.block))
    panel = builder.mul(blocks, I64(form.record))
    rows_of_x = [offset_by(builder, x, (r, builder.mul(width, I64(4)))) for r in range(rows)]
    per_group = X_GROUP // form.block

    def some(first, panels):
        totals = [[cgutils.alloca_once(builder, F32S) for _ in range(panels)] for _ in range(rows)]
        for one in itertools.chain.from_iterable(totals):
            builder.store(constant(0.0), one)
        starts = [offset_by(builder, w, (builder.add(first, I64(n)), panel)) for n in range(panels)]
        with cgutils.for_range(builder, blocks) as loop:
            records = [offset_by(builder, at, (loop.index, I64(form.record))) for at in starts]
            for at, line in itertools.product(records, range(0, form.record, 64)):
                ask(builder, builder.add(at, I64(AHEAD + line)))
            group = builder.udiv(loop.index, I64(per_group))
            part = builder.urem(loop.index, I64(per_group))
            x_at = [offset_by(builder, at, (group, I64(X_GROUP_BYTES))) for at in rows_of_x]
            _block(builder, form, digits, records, x_at, part, totals)
        for r, row in enumerate(totals):
            for n, one in enumerate(row):
                place = offset_by(builder, y, (r, y_row), (builder.add(first, I64(n)), I64(4 * LANES)))
                builder.store(builder.load(one, typ=F32S), pointer(builder, place), align=4)

    _in_groups(builder, rows, count, some)


@compiled(types.void, *[types.int64] * 8)
def _blocks_dot(builder, rows, kind, w, width, x, y, y_row, count):
    most = max(MAX_ROWS.values()) + 1
    done = builder.append_basic_block("done")
    switch = builder.switch(builder.add(builder.mul(kind, I64(most)), rows), done)
    for each, (form, digits) in _KINDS.items():
        for many in range(1, MAX_ROWS[digits] + 1):
            block = builder.append_basic_block(f"rows{many}kind{each}")
            switch.add_case(I64(each * most + many), block)
            builder.position_at_end(block)
            _body(builder, many, form, digits, w, width, x, y, y_row, count)
            builder.branch(done)
    builder.position_at_end(done)


@machine_code(types.void, *[types.int64] * 8)
def blocks_dot(rows, kind, w, width, x, y, y_row, count):
    """y[r, 16 j + lane] for panels j < count at `w`, of `width` inputs; `y_row` is bytes between rows of y.

    At most MAX_ROWS of the kind's digits.
    """
    _blocks_dot(rows, kind, w, width, x, y, y_row, count)


# -- what compiled code needs to know of a kind; indices are kinds

_NONE = (0,) * FIRST_KIND
_MOST_KINDS = FIRST_KIND + len(_KINDS)
_RECORD = _NONE + tuple(form.record for form, _ in _KINDS.values())
_BLOCK = _NONE + tuple(form.block for form, _ in _KINDS.values())
_BITS = _NONE + tuple(form.bits for form, _ in _KINDS.values())
_CODE_AT = _NONE + tuple(form.code_at for form, _ in _KINDS.values())
_SCALE_BYTES = _NONE + tuple(form.scale_bytes for form, _ in _KINDS.values())
_OFFSETS = _NONE + tuple(int(form.offsets) for form, _ in _KINDS.values())
_ROWS_AT_ONCE = _NONE + tuple(MAX_ROWS[digits] for _, digits in _KINDS.values())
_TOP = (np.float32(0),) * FIRST_KIND + tuple(np.float32(_HIGHEST[digits]) for _, digits in _KINDS.values())


@njit(error_model="numpy")
def panel_bytes(kind, width):
    """Bytes of 16 rows of `width` inputs."""
    return width // _BLOCK[kind] * _RECORD[kind]


@machine_code(types.void, *[types.int64] * 9)
def linear_blocks(kind, weight, width, x, rows, y, y_row, columns, corner):
    """As `layers.linear` for a matrix in blocks; `weight` is the panel of the first column."""
    panels, panel, x_row = columns // LANES, panel_bytes(kind, width), 4 * width
    blocks, first = -(-rows // _ROWS_AT_ONCE[kind]), 0
    for i in range(blocks):
        count = (rows - first) // (blocks - i)
        from_x, into = x + first * x_row, y + first * y_row
        blocks_dot(count, kind, weight, width, from_x, into, y_row, panels)
        if columns % LANES:  # the rest of the last panel belongs to nobody
            blocks_dot(count, kind, weight + panels * panel, width, from_x, corner, 4 * LANES, 1)
            for r in range(count):
                for lane in range(columns % LANES):
                    value = get_f32(corner + 4 * (LANES * r + lane))
                    put_f32(into + r * y_row + 4 * (LANES * panels + lane), value)
        first += count


@njit(error_model="numpy")
def _side_of(kind, at, lane):
    if _SCALE_BYTES[kind] == 4 * LANES:
        return get_f32(at + 4 * lane)
    return get_f16(at + 2 * lane)


@njit(error_model="numpy")
def _code_of(kind, codes, k, lane):
    if _BITS[kind] == 4:
        byte = get_u8(codes + k // 8 * 64 + 4 * lane + k % 4)
        return byte >> 4 if k % 8 >= 4 else byte & 15
    return get_u8(codes + k // 4 * 64 + 4 * lane + k % 4) - 128


@machine_code(types.void, *[types.int64] * 5)
def embed_block_row(kind, matrix, width, row, into):
    """Row `row` of a matrix in blocks as floats."""
    lane, at = row % LANES, matrix + row // LANES * panel_bytes(kind, width)
    for first in range(0, width, _BLOCK[kind]):
        scale, offset = _side_of(kind, at, lane), np.float32(0)
        if _OFFSETS[kind]:
            offset = _side_of(kind, at + _SCALE_BYTES[kind], lane)
        for k in range(_BLOCK[kind]):
            code = _code_of(kind, at + _CODE_AT[kind], k, lane)
            put_f32(into + 4 * (first + k), np.float32(code) * scale + offset)
        at += _RECORD[kind]


@compiled(types.int64, types.int64, Vector, types.int64)
def _put_fixed(builder, at, x, three):
    """Digits of the integers nearest to x, 32 bytes apart; their sum. `three` is 0 for two digits."""
    rest = builder.fptosi(call(builder, "llvm.rint.v16f32", F32S, x), I32S)
    sum_ = builder.sext(tree(builder, rest, builder.add), I64)
    half, seven = constant(64, I32S), constant(7, I32S)
    for d in range(2):
        low = builder.sub(builder.and_(builder.add(rest, half), constant(127, I32S)), half)
        higher = builder.ashr(builder.sub(rest, low), seven)
        if d == 1:  # the last of two digits is whatever is left
            low = builder.select(builder.icmp_signed("!=", three, I64(0)), low, rest)
        builder.store(builder.trunc(low, I8S), pointer(builder, builder.add(at, I64(32 * d))), align=1)
        rest = higher
    builder.store(builder.trunc(rest, I8S), pointer(builder, builder.add(at, I64(64))), align=1)
    return sum_


@njit(error_model="numpy")
def pack_blocks(kind, at, a, b):
    """32 floats as a packed group at `at`. One that is not finite makes its step NaN, and so every sum of it."""
    top = highest(vmax(magnitude(a), magnitude(b)))
    step = top / _TOP[kind]
    inverse = _TOP[kind] / top if top > 0 else np.float32(0)
    wrong = total((a + b) * spread(np.float32(0)))
    put_f32(at, step + wrong)
    three = kind % 2
    put_f32(at + 4, np.float32(_put_fixed(at + X_DIGITS_AT, a * spread(inverse), three)) * step)
    put_f32(at + 8, np.float32(_put_fixed(at + X_DIGITS_AT + 16, b * spread(inverse), three)) * step)


@compiled(types.void, *[types.int64] * 5)
def _dense_block(builder, kind, at, out, stride, wide):
    """The values of one record: for each input 16 of them at `out`, inputs `stride` bytes apart, fp32 or bf16."""
    done = builder.append_basic_block("done")
    switch = builder.switch(builder.add(kind, builder.mul(wide, I64(_MOST_KINDS))), done)
    for (each, (form, _)), width in itertools.product(_KINDS.items(), (0, 1)):
        block = builder.append_basic_block(f"dense{each}wide{width}")
        switch.add_case(I64(each + _MOST_KINDS * width), block)
        builder.position_at_end(block)
        _put_values(builder, form, at, out, stride, width)
        builder.branch(done)
    builder.position_at_end(done)


def _put_values(builder, form, at, out, stride, wide):
    scale = _side(builder, at, form)
    offset = _side(builder, builder.add(at, I64(form.scale_bytes)), form) if form.offsets else None
    per_turn = 4 if form.bits == 8 else 8
    with cgutils.for_range(builder, I64(form.block // per_turn)) as loop:
        lanes = _codes(builder, form, offset_by(builder, at, (loop.index, I64(64)), (1, I64(form.code_at))))
        for v, byte in itertools.product(range(len(lanes)), range(4)):
            code = builder.and_(builder.lshr(lanes[v], constant(8 * byte, I32S)), constant(255, I32S))
            code = code if form.bits == 4 else builder.sub(code, constant(128, I32S))
            value = builder.fmul(builder.sitofp(code, F32S), scale)  # a product and a sum, each rounded
            value = value if offset is None else builder.fadd(value, offset)
            place = offset_by(builder, out, (loop.index, builder.mul(stride, I64(per_turn))), (4 * v + byte, stride))
            if wide:
                builder.store(value, pointer(builder, place), align=4)
            else:
                builder.store(narrowed(builder, value), pointer(builder, place), align=2)


@machine_code(types.void, *[types.int64] * 6)
def dense_columns(kind, matrix, width, panels, out, wide):
    """All of a matrix in blocks as [width, 16 · panels], inputs by rows: fp32 where `wide` is 1, else bf16."""
    size, record, panel = 4 if wide else 2, _RECORD[kind], panel_bytes(kind, width)
    stride = size * LANES * panels
    for block in range(width // _BLOCK[kind]):
        into = out + block * _BLOCK[kind] * stride
        for n in range(panels):
            _dense_block(kind, matrix + n * panel + block * record, into + n * LANES * size, stride, wide)
