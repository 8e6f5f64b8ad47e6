"""Attention over a KV cache in panels, full or budgeted, for all rows of a step at once.

An online softmax (Milakov & Gimelshein 2018) over blocks of 128 slots, in tasks of 512 whose bounds are fixed slots,
merged at the end. A row never sees the slots in its unseen ranges. Under `rebased` positions a query looks at prefix
slots with its rotation at its rank and at the others with the one at its position, inside one softmax.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types

from bdcli.backends.cpu import tables
from bdcli.backends.cpu.amx import TILE_ROWS, split_row, tile_panels
from bdcli.backends.cpu.layers import add_bias, kind_of, linear, norm_heads, pack, rotate, row_at, size_of
from bdcli.backends.cpu.machine.simd import (
    get,
    get_f32,
    get_i64,
    highest,
    machine_code,
    put,
    put_bf16_one,
    put_f32,
    put_i64,
    put_narrow,
    spread,
    total,
    vexp,
    vfma,
    vmax,
)
from bdcli.backends.cpu.products import DOTS, FLOATS, MAX_ROWS, TILES, panels
from bdcli.backends.cpu.tables import field, number


@njit(error_model="numpy")
def slot_of(model, position):
    if field(model, tables.RING) == 0:
        return position - field(model, tables.SHIFT)
    if position < field(model, tables.SINKS):
        return position
    return field(model, tables.RING_AT) + position % field(model, tables.RING)


@njit(error_model="numpy")
def put_range(at, first, stop):
    put_i64(at, first)
    put_i64(at + 8, stop)


@njit(error_model="numpy")
def unseen_ranges(model, table, start, rows):
    """Slot ranges that each row may not see, UNSEEN_RANGES of them a row (the rules: `bdcli.cache.view`)."""
    ring, ring_at = field(model, tables.RING), field(model, tables.RING_AT)
    end = field(model, tables.SLOTS)
    for r in range(rows):
        t, at = start + r, table + 16 * tables.UNSEEN_RANGES * r
        for i in range(tables.UNSEEN_RANGES):
            put_range(at + 16 * i, 0, 0)
        if ring == 0:
            put_range(at, t - field(model, tables.SHIFT) + 1, end)
            continue
        put_range(at, min(t + 1, field(model, tables.PREFIX)), ring_at)
        put_range(at + 16, ring_at + ring, end)
        oldest = max(field(model, tables.SINKS), t - field(model, tables.WINDOW) + 1)
        first = (t + 1) % ring
        beyond = first + ring - max(0, t - oldest + 1)
        put_range(at + 32, ring_at + first, ring_at + min(beyond, ring))
        put_range(at + 48, ring_at, ring_at + max(beyond - ring, 0))


@njit(error_model="numpy")
def used_slots(model, start, rows):
    """Slots up to the last that any row may see, rounded up to 16."""
    if field(model, tables.RING) == 0:
        return (start + rows - field(model, tables.SHIFT) + 15) // 16 * 16
    last = start + rows - 1
    if last < field(model, tables.SINKS):
        return field(model, tables.RING_AT)
    ring = field(model, tables.RING)
    return field(model, tables.RING_AT) + (min(last + 1, ring) + 15) // 16 * 16


@njit(error_model="numpy")
def store_key(model, layer, kv_head, slot, key):
    dim, block, lane = field(model, tables.DIM), slot // 16, slot % 16
    base = kv_head * field(model, tables.SLOTS) * dim + block * 16 * dim
    if field(model, tables.KIND) != FLOATS:
        at = field(layer, tables.KEYS) + 2 * base + 4 * lane
        for d in range(dim):
            put_bf16_one(at + (d // 2) * 64 + (d % 2) * 2, get_f32(key + 4 * d))
    else:
        at = field(layer, tables.KEYS) + 4 * base + 4 * lane
        for d in range(dim):
            put_f32(at + d * 64, get_f32(key + 4 * d))


@njit(error_model="numpy")
def store_value(model, layer, kv_head, slot, value):
    dim = field(model, tables.DIM)
    base = kv_head * field(model, tables.SLOTS) * dim
    if field(model, tables.KIND) != FLOATS:
        at = field(layer, tables.VALUES) + 2 * (base + slot // 2 * 2 * dim + slot % 2)
        for d in range(dim):
            put_bf16_one(at + 4 * d, get_f32(value + 4 * d))
    else:
        at = field(layer, tables.VALUES) + 4 * (base + slot * dim)
        for d in range(0, dim, 16):
            put(at + 4 * d, get(value + 4 * d))


@njit(error_model="numpy")
def narrow_row(source, count, into):
    """`count` floats, a multiple of 16, as bf16; zeros up to 32."""
    for i in range(0, count, 32):
        b = get(source + 4 * i + 64) if i + 16 < count else spread(np.float32(0))
        put_narrow(into + 2 * i, get(source + 4 * i), b)


@njit(error_model="numpy")
def put_query(model, one, position, into, corner):
    """A query rotated and scaled: floats; for dot products D bf16; for tiles D high parts and D low parts."""
    kind, dim = kind_of(model, field(model, tables.KIND), tables.ATTENTION_TILES), field(model, tables.DIM)
    floats = corner if kind in (TILES, DOTS) else into
    rotate(model, one, position, floats, number(model, tables.SCALE))
    if kind == TILES:
        split_row(floats, dim, into, 2 * dim)
    elif kind == DOTS:
        narrow_row(floats, dim, into)


@machine_code(types.void, *[types.int64] * 7)
def project_head(model, layer, call, own, start, rows, head):
    """Query, key or value head `head` of all rows: project, norm, rotate, and put it where attention finds it."""
    kind = kind_of(model, field(layer, tables.QKV_KIND), tables.QKV_TILES)
    dim, hidden = field(model, tables.DIM), field(model, tables.HIDDEN)
    heads, kv_heads = field(model, tables.HEADS), field(model, tables.KV_HEADS)
    y, corner = own + field(call, tables.TILE), own + field(call, tables.CORNER)
    weight = row_at(kind, field(layer, tables.QKV), head * dim, hidden)
    linear(kind, weight, hidden, own + field(call, tables.NARROW), rows, y, 4 * dim, dim, corner)
    if field(layer, tables.QKV_BIAS) != 0:
        add_bias(y, rows, 4 * dim, field(layer, tables.QKV_BIAS) + 4 * head * dim, dim)
    if head < heads + kv_heads and field(layer, tables.QK_NORM) != 0:
        norm_heads(model, y, rows, field(layer, tables.QK_NORM) + 4 * head * dim)
    group = heads // kv_heads
    for r in range(rows):
        one, t = y + 4 * r * dim, start + r
        if head >= heads + kv_heads:
            store_value(model, layer, head - heads - kv_heads, slot_of(model, t), one)
        elif head >= heads:
            rotate(model, one, t, one, np.float32(1))
            store_key(model, layer, head - heads, slot_of(model, t), one)
        else:
            into = 4 * dim * ((head // group * rows + r) * group + head % group)
            if field(model, tables.LAST_RANK) >= 0:
                rank = min(t, field(model, tables.LAST_RANK))
                put_query(model, one, rank, field(call, tables.RANK_QUERIES) + into, corner)
            put_query(model, one, t, field(call, tables.QUERIES) + into, corner)


@njit(error_model="numpy")
def soften(part, dim, scores, columns):
    """One row of an online softmax: scores become weights, and what was summed before is scaled to the new maximum."""
    top = get(scores)
    for i in range(64, 4 * columns, 64):
        top = vmax(top, get(scores + i))
    before = get_f32(part)
    high = max(before, highest(top))
    base = high if high > -np.inf else np.float32(0)
    sums = spread(np.float32(0))
    for i in range(0, 4 * columns, 64):
        weight = vexp(get(scores + i) - spread(base))
        sums = sums + weight
        put(scores + i, weight)
    factor = np.float32(1)
    if before != high:
        scale = vexp(spread(before - base))
        factor = highest(scale)
        for i in range(0, 4 * dim, 64):
            put(part + 8 + i, get(part + 8 + i) * scale)
    put_f32(part, high)
    put_f32(part + 4, get_f32(part + 4) * factor + total(sums))


@njit(error_model="numpy")
def mask(scores, unseen, first, stop):
    """-inf where one row's unseen ranges meet slots first..stop-1."""
    for i in range(tables.UNSEEN_RANGES):
        a, b = max(get_i64(unseen + 16 * i), first), min(get_i64(unseen + 16 * i + 8), stop)
        for slot in range(a, b):
            put_f32(scores + 4 * (slot - first), np.float32(-np.inf))


@machine_code(types.void, *[types.int64] * 8)
def multiply_keys(kind, dim, columns, count, keys, queries, scores, ahead):
    """Scores [count, BLOCK] of queries against `columns` keys."""
    panel = 16 * dim * size_of(kind)
    if kind == TILES:
        shape = ((columns // 16) << 32) | (dim // 32)
        tile_panels(queries, 4 * dim, 2 * dim, keys, 64, 1024, panel, scores, 4 * tables.BLOCK, shape)
        return
    for at in range(0, 4 * count * tables.BLOCK, 64):
        put(scores + at, spread(np.float32(0)))
    shape = ((columns // 16) << 32) | (panel // 64)
    panels(count, kind, keys, 64, panel, queries, 4 * dim, scores, 4 * tables.BLOCK, shape, ahead)


@machine_code(types.void, *[types.int64] * 8)
def add_values(dim, columns, count, values, weights, soft, corner, into):
    """Tiles' part outputs += weights [count, BLOCK] · values. Slots up to a multiple of 32 are read, at weight 0."""
    for r in range(count):
        split_row(weights + 4 * tables.BLOCK * r, columns, soft + 4 * tables.BLOCK * r, 2 * tables.BLOCK)
    shape = ((dim // 16) << 32) | ((columns + 31) // 32)
    tile_panels(soft, 4 * tables.BLOCK, 2 * tables.BLOCK, values, 4 * dim, 64 * dim, 64, corner, 4 * dim, shape)
    for r in range(count):
        row, from_tile = into + r * 4 * (2 + dim), corner + 4 * dim * r
        for i in range(0, 4 * dim, 64):
            put(row + i, get(row + i) + get(from_tile + i))


@machine_code(types.void, *[types.int64] * 9)
def attend_block(model, layer, call, own, rows, kv_head, part, first, stop):
    """All rows of a KV head against slots first..stop-1, at most BLOCK, all prefix or none."""
    kind, dim = kind_of(model, field(model, tables.KIND), tables.ATTENTION_TILES), field(model, tables.DIM)
    group = field(model, tables.HEADS) // field(model, tables.KV_HEADS)
    size, columns = size_of(kind), stop - first
    ranked = field(model, tables.LAST_RANK) >= 0 and first < field(model, tables.RING_AT)
    queries = field(call, tables.RANK_QUERIES) if ranked else field(call, tables.QUERIES)
    queries += 4 * dim * kv_head * rows * group
    base = (kv_head * field(model, tables.SLOTS) + first) * dim * size
    keys, values = field(layer, tables.KEYS) + base, field(layer, tables.VALUES) + base
    scores, unseen = own + field(call, tables.SCORES), own + field(call, tables.UNSEEN)
    every, part_row = rows * group, 4 * (2 + dim)
    most = TILE_ROWS if kind == TILES else MAX_ROWS
    blocks = -(-every // most)
    done, ahead = 0, columns * dim * size  # the next block follows; later rows find it asked for
    for i in range(blocks):
        count = min(every - done, TILE_ROWS) if kind == TILES else (every - done) // (blocks - i)
        multiply_keys(kind, dim, columns, count, keys, queries + 4 * dim * done, scores, ahead)
        for r in range(count):
            row = scores + 4 * tables.BLOCK * r
            mask(row, unseen + 16 * tables.UNSEEN_RANGES * ((done + r) // group), first, stop)
            soften(part + part_row * (done + r), dim, row, columns)
        into = part + part_row * done + 8
        if kind == TILES:
            soft, corner = own + field(call, tables.SOFT), own + field(call, tables.CORNER)
            add_values(dim, columns, count, values, scores, soft, corner, into)
        else:
            weights = scores
            if kind == DOTS:
                weights = own + field(call, tables.SOFT)
                for r in range(count):
                    narrow_row(scores + 4 * tables.BLOCK * r, columns, weights + 4 * tables.BLOCK * r)
            shape = ((dim // 16) << 32) | (columns * size // 4)
            panels(count, kind, values, 4 * dim, 64, weights, 4 * tables.BLOCK, into, part_row, shape, ahead)
        done, ahead = done + count, 0


@machine_code(types.void, *[types.int64] * 9)
def attend(model, layer, call, own, rows, kv_head, chunk, chunks, used):
    """One task: all rows of a KV head against a chunk of slots, into its part."""
    dim, group = field(model, tables.DIM), field(model, tables.HEADS) // field(model, tables.KV_HEADS)
    every, part_row = rows * group, 4 * (2 + dim)
    part = field(call, tables.PARTS) + (kv_head * chunks + chunk) * every * part_row
    for r in range(every):
        put_f32(part + r * part_row, np.float32(-np.inf))
        put_f32(part + r * part_row + 4, np.float32(0))
        for i in range(0, 4 * dim, 64):
            put(part + r * part_row + 8 + i, spread(np.float32(0)))
    first, stop = chunk * tables.TASK_SLOTS, min((chunk + 1) * tables.TASK_SLOTS, used)
    while first < stop:
        edge = min(first + tables.BLOCK, stop)
        if first < field(model, tables.RING_AT) < edge:  # one rotation of the queries a block
            edge = field(model, tables.RING_AT)
        attend_block(model, layer, call, own, rows, kv_head, part, first, edge)
        first = edge


@machine_code(types.void, *[types.int64] * 6)
def merge(model, call, own, rows, chunks, kind):
    """Attention output [rows, H·D] from the parts, packed into NARROW for a product of `kind`."""
    dim, heads, kv_heads = field(model, tables.DIM), field(model, tables.HEADS), field(model, tables.KV_HEADS)
    group, part_row = heads // kv_heads, 4 * (2 + dim)
    every = rows * group
    between = every * part_row
    for r in range(rows):
        for head in range(heads):
            first = field(call, tables.PARTS) + (head // group * chunks * every + r * group + head % group) * part_row
            high = get_f32(first)
            for c in range(1, chunks):
                high = max(high, get_f32(first + c * between))
            for i in range(0, 4 * dim, 128):
                a = b = spread(np.float32(0))
                sums = np.float32(0)
                for c in range(chunks):
                    at = first + c * between
                    scale = vexp(spread(get_f32(at) - high))
                    sums += highest(scale) * get_f32(at + 4)
                    a, b = vfma(get(at + 8 + i), scale, a), vfma(get(at + 72 + i), scale, b)
                whole = spread(np.float32(1) / sums)
                pack(kind, own + field(call, tables.NARROW), r, heads * dim, head * dim + i // 4, a * whole, b * whole)
