"""Causal attention over a whole prompt near the speed of large products: compiled, on torch's own threads.

An online softmax (Milakov & Gimelshein 2018) over blocks of keys, for a block of positions of all heads that share a KV
head. Such a task copies each block of keys and values into the layout that the products read, so a thread's scratch is
less than a megabyte whatever the prompt's length, and of what lies above the diagonal only the rest of a panel is
computed. A row's result does not depend on other rows, on the number of threads or on how long the prompt is.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from bdcli.backends.cpu import amx
from bdcli.backends.cpu.amx import TILE_ROWS, end_tiles, more_square_tiles, shape_tiles, square_tiles
from bdcli.backends.cpu.attention import narrow_row
from bdcli.backends.cpu.machine.simd import (
    fetch_add,
    get,
    get_bf16,
    get_f32,
    highest,
    machine_code,
    paired,
    put,
    put_f32,
    put_transposed,
    spread,
    total,
    vexp,
    vlarger,
)
from bdcli.backends.cpu.machine.support import dots_pay
from bdcli.backends.cpu.machine.threads import run_on_torch_threads
from bdcli.backends.cpu.products import DOTS, FLOATS, TILES, WIDE_ROWS, more_wide_panels, wide_panels
from bdcli.backends.cpu.prompt.rows import get_wide, put_as
from bdcli.backends.cpu.tables import field, number

TASK_ROWS = 384  # queries of a task, of all heads of a group
BLOCK_KEYS = 256  # whose scores with a few rows are in the first cache at once, and which lie in the second
PANEL, PAIRED = 16, 32  # keys of a panel, and of what a tile of values takes

JOB_FIELDS = 24
(
    KIND,  # products.FLOATS; for bf16 also products.DOTS and products.TILES, which read pairs
    NARROW,  # 1: inputs and output are bf16, 0: floats
    TOKENS,
    TASK_TOKENS,  # positions of a task
    GROUP,  # query heads of a KV head
    KV_HEADS,
    DIM,
    SCALE,  # float
    QUERIES,  # address; of each tensor the bytes between rows and between heads follow
    QUERY_ROW,
    QUERY_HEAD,
    KEYS,
    KEY_ROW,
    KEY_HEAD,
    VALUES,
    VALUE_ROW,
    VALUE_HEAD,
    OUT,
    OUT_ROW,
    OUT_HEAD,
    COUNTS,  # address of the counts of threads that came and, a cache line on, of tasks claimed
    SCRATCH,  # address; thread t's starts at SCRATCH + t · SCRATCH_BYTES
    SCRATCH_BYTES,
    TILE_SHAPES,  # address of what `shape_tiles` reads
) = range(JOB_FIELDS)


SCORES_ROW = 4 * BLOCK_KEYS


@njit(inline="always")
def rows_of(kind):
    """Rows that one product takes."""
    return 2 * TILE_ROWS if kind == TILES else WIDE_ROWS


@njit(error_model="numpy")
def copy_keys(job, source, count, panels, corner):
    """`count` keys into panels of 16, with zeros up to a whole one: floats [D][16], or pairs [D / 2][16]."""
    dim, narrow, row = field(job, DIM), field(job, NARROW), field(job, KEY_ROW)
    words = dim if field(job, KIND) == FLOATS else dim // 2
    for first in range(0, count, PANEL):
        for i in range(PANEL):
            at, into = source + (first + i) * row, corner + 4 * words * i
            for d in range(0, words, 16):
                if first + i >= count:
                    put(into + 4 * d, spread(np.float32(0)))
                elif words == dim:
                    put(into + 4 * d, get_wide(narrow, at + (4 - 2 * narrow) * d))
                else:
                    put(into + 4 * d, get(at + 4 * d))
        for d in range(0, words, 16):
            put_transposed(corner + 4 * d, 4 * words, panels + 4 * (first * words + 16 * d))


@njit(error_model="numpy")
def copy_values(job, source, count, into):
    """`count` values as rows of floats, or as rows of pairs of two values each, with zeros up to PAIRED values."""
    dim, narrow, row, none = field(job, DIM), field(job, NARROW), field(job, VALUE_ROW), spread(np.float32(0))
    if field(job, KIND) == FLOATS:
        for i in range(count):
            for d in range(0, dim, 16):
                put(into + 4 * (i * dim + d), get_wide(narrow, source + i * row + (4 - 2 * narrow) * d))
        return
    for i in range(0, -(-count // PAIRED) * PAIRED, 2):
        for d in range(0, dim, 16):
            at = source + i * row + 2 * d
            one = get_bf16(at) if i < count else none
            put(into + 2 * i * dim + 4 * d, paired(one, get_bf16(at + row) if i + 1 < count else none))


@njit(error_model="numpy")
def copy_queries(job, kv_head, start, stop, rows, into):
    """Queries of positions start..stop-1, a group's heads side by side, then zeros up to `rows` rows."""
    dim, narrow, group, at = field(job, DIM), field(job, NARROW), field(job, GROUP), into
    pairs = field(job, KIND) != FLOATS
    for t in range(start, stop):
        for g in range(group):
            source = field(job, QUERIES) + t * field(job, QUERY_ROW) + (kv_head * group + g) * field(job, QUERY_HEAD)
            if pairs:
                for d in range(0, 2 * dim, 64):
                    put(at + d, get(source + d))
                at += 2 * dim
            else:
                for d in range(0, dim, 16):
                    put(at + 4 * d, get_wide(narrow, source + (4 - 2 * narrow) * d))
                at += 4 * dim
    end = into + rows * (2 * dim if pairs else 4 * dim)
    while at < end:
        put(at, spread(np.float32(0)))
        at += 64


@njit(error_model="numpy")
def soften(state, sums, dim, scores, seen, columns, scale):
    """One row of the online softmax: `seen` of `columns` scores become weights, the others 0.

    `state` is the row's maximum and sum; the outputs `sums` are scaled to the new maximum.
    """
    for i in range(max(seen, 0), columns):
        put_f32(scores + 4 * i, np.float32(-np.inf))
    top = get(scores)
    for i in range(64, 4 * columns, 64):
        top = vlarger(get(scores + i), top)
    before = get_f32(state)
    high = max(before, highest(top))
    factor, base = spread(scale), spread(high)
    weights = spread(np.float32(0))
    for i in range(0, 4 * columns, 64):
        weight = vexp((get(scores + i) - base) * factor)  # large scores blur in a product, not in a difference
        weights = weights + weight
        put(scores + i, weight)
    fade = np.float32(1)
    if before != high:
        fading = vexp(spread((before - high) * scale))
        fade = highest(fading)
        for i in range(0, 4 * dim, 64):
            put(sums + i, get(sums + i) * fading)
    put_f32(state, high)
    put_f32(state + 4, get_f32(state + 4) * fade + total(weights))


@njit(error_model="numpy")
def finish(job, kv_head, start, stop, state, sums):
    """Outputs of positions start..stop-1 from sums over weights."""
    dim, group = field(job, DIM), field(job, GROUP)
    for t in range(start, stop):
        for g in range(group):
            into = field(job, OUT) + t * field(job, OUT_ROW) + (kv_head * group + g) * field(job, OUT_HEAD)
            whole = spread(np.float32(1) / get_f32(state + 4))
            for d in range(0, dim, 16):
                put_as(field(job, NARROW), into + (4 - 2 * field(job, NARROW)) * d, get(sums + 4 * d) * whole)
            state, sums = state + 8, sums + 4 * dim


@njit(error_model="numpy")
def scratch_of(dim, rows):
    """Offsets of keys, values, queries, sums, states, scores and a corner in a thread's scratch, and its size."""
    keys = 0
    values = keys + 4 * BLOCK_KEYS * dim
    queries = values + 4 * BLOCK_KEYS * dim
    sums = queries + 4 * rows * dim
    states = sums + 4 * rows * dim
    scores = states + (8 * rows + 63) // 64 * 64
    corner = scores + 2 * TILE_ROWS * SCORES_ROW
    return keys, values, queries, sums, states, scores, corner, corner + 4 * PANEL * dim


@machine_code(types.void, *[types.int64] * 6)
def multiply_keys(kind, dim, keys, queries, scores, columns):
    """Scores of `rows_of(kind)` queries against `columns` keys."""
    count = columns // PANEL
    if kind == TILES:
        square_tiles(queries, 2 * dim, keys, 64, 1024, 32 * dim, scores, SCORES_ROW, count, dim // 32)
        return
    words = dim if kind == FLOATS else dim // 2
    wide_panels(kind, keys, 64, 64 * words, queries, 4 * words, scores, SCORES_ROW, count, words)


@machine_code(types.void, *[types.int64] * 6)
def add_values(kind, dim, values, weights, sums, seen):
    """Sums of `rows_of(kind)` rows += weights · the first `seen` values."""
    if kind == TILES:
        more_square_tiles(
            weights, SCORES_ROW, values, 4 * dim, 64 * dim, 64, sums, 4 * dim, dim // 16, -(-seen // PAIRED)
        )
        return
    steps = seen if kind == FLOATS else -(-seen // 2)
    more_wide_panels(kind, values, 4 * dim, 64, weights, SCORES_ROW, sums, 4 * dim, dim // 16, steps)


@machine_code(types.void, *[types.int64] * 4)
def attend_positions(job, kv_head, start, own):
    """One task: positions start.. of the heads of a KV head."""
    dim, group, kind = field(job, DIM), field(job, GROUP), field(job, KIND)
    stop, step = min(start + field(job, TASK_TOKENS), field(job, TOKENS)), rows_of(kind)
    rows = -(-(stop - start) * group // step) * step
    offsets = scratch_of(dim, rows)
    keys, values, queries, sums = own + offsets[0], own + offsets[1], own + offsets[2], own + offsets[3]
    states, scores, corner = own + offsets[4], own + offsets[5], own + offsets[6]
    pair = 1 if kind == FLOATS else 2
    words = dim // pair
    copy_queries(job, kv_head, start, stop, rows, queries)
    for r in range(rows):
        put_f32(states + 8 * r, np.float32(-np.inf))
        put_f32(states + 8 * r + 4, np.float32(0))
    for i in range(0, 4 * rows * dim, 64):
        put(sums + i, spread(np.float32(0)))
    for first in range(0, stop, BLOCK_KEYS):
        count = min(BLOCK_KEYS, stop - first)
        source = kv_head * field(job, KEY_HEAD) + first * field(job, KEY_ROW)
        copy_keys(job, field(job, KEYS) + source, count, keys, corner)
        source = kv_head * field(job, VALUE_HEAD) + first * field(job, VALUE_ROW)
        copy_values(job, field(job, VALUES) + source, count, values)
        for row in range(0, rows, step):
            last = min(start + (row + step - 1) // group, stop - 1)
            seen = min(count, last + 1 - first)
            if seen <= 0:
                continue
            columns = -(-seen // PANEL) * PANEL
            multiply_keys(kind, dim, keys, queries + 4 * words * row, scores, columns)
            for r in range(step):
                one, sees = scores + SCORES_ROW * r, min(start + (row + r) // group + 1 - first, seen)
                one_sums = sums + 4 * dim * (row + r)
                soften(states + 8 * (row + r), one_sums, dim, one, sees, columns, number(job, SCALE))
                if kind != FLOATS:
                    narrow_row(one, columns, one)
            add_values(kind, dim, values, scores, sums + 4 * dim * row, seen)
    finish(job, kv_head, start, stop, states, sums)


@machine_code(types.void, types.int64)
def attend_prompt(job):
    """What each thread does: claim tasks, those of the most keys first, until none is left."""
    counts, kv_heads, size = field(job, COUNTS), field(job, KV_HEADS), field(job, TASK_TOKENS)
    own = field(job, SCRATCH) + fetch_add(counts, 1) * field(job, SCRATCH_BYTES)
    blocks = -(-field(job, TOKENS) // size)
    if field(job, KIND) == TILES:
        shape_tiles(field(job, TILE_SHAPES))
    task = fetch_add(counts + 64, 1)
    while task < blocks * kv_heads:
        attend_positions(job, task % kv_heads, (blocks - 1 - task // kv_heads) * size, own)
        task = fetch_add(counts + 64, 1)
    if field(job, KIND) == TILES:
        end_tiles()


# -- from Python


def scratch_bytes(dim: int, group: int) -> int:
    """Of a thread, whatever the prompt's length."""
    step = 2 * TILE_ROWS
    return scratch_of.py_func(dim, -(-task_tokens(group) * group // step) * step)[-1]


def task_tokens(group: int) -> int:
    """Positions of a task for `group` query heads a KV head."""
    return max(1, TASK_ROWS // group)


def kind_for(dtype: torch.dtype) -> int:
    """How products are made here, the same for every prompt."""
    if dtype is torch.float32:
        return FLOATS
    return TILES if amx.available() else DOTS if dots_pay() else FLOATS


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention [T, H, D] of queries q [T, H, D] over keys and values [Hkv, T, D], each of its past; fp32 or bf16.

    D is a multiple of 32. The plain twin is `bdcli.cache.causal.causal_attention`.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (tokens, heads, dim), kv_heads, size = q.shape, k.shape[0], q.element_size()
    group, threads = heads // kv_heads, torch.get_num_threads()
    out, scratch_size, shapes = q.new_empty(q.shape), scratch_bytes(dim, group), amx.tile_configs()
    scratch = torch.empty(threads * scratch_size + 3 * 64, dtype=torch.uint8)
    counts = -(-scratch.data_ptr() // 64) * 64
    scratch[: 3 * 64] = 0
    job = np.zeros(JOB_FIELDS, np.int64)
    job[[KIND, NARROW, TOKENS, TASK_TOKENS]] = kind_for(q.dtype), q.dtype is torch.bfloat16, tokens, task_tokens(group)
    job[[GROUP, KV_HEADS, DIM]] = group, kv_heads, dim
    job.view(np.float32)[2 * SCALE] = scale
    for first, x, row, head in ((QUERIES, q, 0, 1), (KEYS, k, 1, 0), (VALUES, v, 1, 0), (OUT, out, 0, 1)):
        job[first : first + 3] = x.data_ptr(), size * x.stride(row), size * x.stride(head)
    job[[COUNTS, SCRATCH, SCRATCH_BYTES]] = counts, counts + 2 * 64, scratch_size
    job[TILE_SHAPES] = shapes.ctypes.data + 64 * (2 * TILE_ROWS - 1)
    run_on_torch_threads("attend_prompt", job.ctypes.data, threads)
    return out
