"""One forward, or one whole draft, as compiled code that every thread of the pool runs side by side.

A forward is a chain of phases with a barrier between them; in a phase, threads claim tasks (a head, a chunk of the KV
cache, a tile of weight rows) until none is left. What is cheap and needed by all, such as a norm, each thread makes for
itself. Weights and keys are read from memory once whatever the number of rows, and a row's result never depends on
the other rows or on the number of threads, so that verifying several tokens writes what plain decoding would.
"""

from __future__ import annotations

from numba import njit, types

from bdcli.backends.cpu import tables
from bdcli.backends.cpu.amx import TILE_ROWS, end_tiles, shape_tiles
from bdcli.backends.cpu.attention import attend, merge, project_head, unseen_ranges, used_slots
from bdcli.backends.cpu.layers import add_linear, embed, gate, kind_of, linear, normed, row_at
from bdcli.backends.cpu.machine.simd import get_i64, machine_code, put_i64
from bdcli.backends.cpu.machine.threads import barrier, claim
from bdcli.backends.cpu.sampling import best, draw
from bdcli.backends.cpu.tables import field


@machine_code(types.void, *[types.int64] * 6)
def logits_of(model, call, own, phase, x, rows):
    """Tiles of the lm head."""
    vocab, hidden = field(model, tables.VOCAB), field(model, tables.HIDDEN)
    kind = kind_of(model, field(model, tables.HEAD_KIND), tables.HEAD_TILES)
    corner = own + field(call, tables.CORNER)
    task = claim(call, phase)
    while task * tables.TILE_COLUMNS < vocab:
        first = task * tables.TILE_COLUMNS
        count = min(tables.TILE_COLUMNS, vocab - first)
        weight = row_at(kind, field(model, tables.HEAD), first, hidden)
        linear(kind, weight, hidden, x, rows, field(call, tables.LOGITS) + 4 * first, 4 * vocab, count, corner)
        task = claim(call, phase)


@njit(error_model="numpy")
def shape_for_rows(model, call, rows):
    """Tiles of this thread multiply `rows` rows by weights from now on."""
    if field(model, tables.TILED) != 0:
        shape_tiles(field(call, tables.TILE_CONFIG) + 64 * (min(rows, TILE_ROWS) - 1))


@njit(error_model="numpy")
def shape_for_attention(model, call, rows):
    """Tiles of this thread multiply `rows` rows by panels from now on."""
    if field(model, tables.TILED) & tables.ATTENTION_TILES:
        shape_tiles(field(call, tables.TILE_CONFIG) + 64 * (min(rows, TILE_ROWS) - 1 + TILE_ROWS))


@machine_code(types.int64, *[types.int64] * 8)
def forward(model, call, thread, phase, start, rows, tokens, logit_rows):
    """Append `rows` tokens at positions start.. and leave logits of the last `logit_rows`; returns the next phase."""
    own = field(call, tables.OWN) + thread * field(call, tables.OWN_BYTES)
    x, ready = field(call, tables.X), own + field(call, tables.NARROW)
    heads, kv_heads = field(model, tables.HEADS), field(model, tables.KV_HEADS)
    hidden, inner, width = field(model, tables.HIDDEN), field(model, tables.INNER), heads * field(model, tables.DIM)
    used = used_slots(model, start, rows)
    chunks = -(-used // tables.TASK_SLOTS)
    unseen_ranges(model, own + field(call, tables.UNSEEN), start, rows)
    embed(model, call, thread, rows, tokens)
    phase = barrier(call, thread, phase)
    for i in range(field(model, tables.LAYERS)):
        layer = model + 8 * (tables.MODEL_FIELDS + i * tables.LAYER_FIELDS)
        qkv = kind_of(model, field(layer, tables.QKV_KIND), tables.QKV_TILES)
        out = kind_of(model, field(layer, tables.OUT_KIND), tables.OUT_TILES)
        gate_up = kind_of(model, field(layer, tables.GATE_UP_KIND), tables.GATE_UP_TILES)
        down = kind_of(model, field(layer, tables.DOWN_KIND), tables.DOWN_TILES)
        shape_for_rows(model, call, rows)
        normed(model, x, rows, field(layer, tables.ATTENTION_NORM), ready, qkv)
        task = claim(call, phase)
        while task < heads + 2 * kv_heads:
            project_head(model, layer, call, own, start, rows, task)
            task = claim(call, phase)
        phase = barrier(call, thread, phase)
        shape_for_attention(model, call, rows * (heads // kv_heads))
        task = claim(call, phase)
        while task < kv_heads * chunks:
            attend(model, layer, call, own, rows, task // chunks, task % chunks, chunks, used)
            task = claim(call, phase)
        phase = barrier(call, thread, phase)
        shape_for_rows(model, call, rows)
        merge(model, call, own, rows, chunks, out)
        task = claim(call, phase)
        while task < hidden // 16:
            add_linear(
                model, call, own, rows, width, field(layer, tables.OUT), field(layer, tables.OUT_BIAS), ready, task, out
            )
            task = claim(call, phase)
        phase = barrier(call, thread, phase)
        normed(model, x, rows, field(layer, tables.MLP_NORM), ready, gate_up)
        task = claim(call, phase)
        while task < inner // 32:
            gate(model, layer, call, own, rows, task)
            task = claim(call, phase)
        phase = barrier(call, thread, phase)
        task = claim(call, phase)
        gated = field(call, tables.GATED)
        while task < hidden // 16:
            add_linear(
                model,
                call,
                own,
                rows,
                inner,
                field(layer, tables.DOWN),
                field(layer, tables.DOWN_BIAS),
                gated,
                task,
                down,
            )
            task = claim(call, phase)
        phase = barrier(call, thread, phase)
    if logit_rows > 0:
        shape_for_rows(model, call, logit_rows)
        last = x + 4 * hidden * (rows - logit_rows)
        kind = kind_of(model, field(model, tables.HEAD_KIND), tables.HEAD_TILES)
        normed(model, last, logit_rows, field(model, tables.FINAL_NORM), ready, kind)
        logits_of(model, call, own, phase, ready, logit_rows)
    return barrier(call, thread, phase)


@machine_code(types.void, *[types.int64] * 3)
def read(model, call, thread):
    start, rows, tokens = field(call, tables.START), field(call, tables.ROWS), field(call, tables.TOKENS)
    drafts = field(call, tables.DRAFT)
    if drafts == 0:
        forward(model, call, thread, 0, start, rows, tokens, field(call, tables.LOGIT_ROWS))
        return
    phase = 0
    for i in range(drafts):
        phase = forward(model, call, thread, phase, start, rows, tokens, 1)
        tokens += 8 * rows
        if thread == 0:
            put_i64(tokens, draw(call, i) if field(call, tables.Q_ROWS) != 0 else best(call))
        phase = barrier(call, thread, phase)
        start, rows = start + rows, 1
        if get_i64(tokens) < 0:  # a logit was not finite
            return


@machine_code(types.void, *[types.int64] * 3)
def run(model, call, thread):
    """A plain forward over ROWS tokens, or, with DRAFT > 0, as many forwards as there are tokens to draft.

    Drafted tokens are appended to TOKENS; the last one is not read.
    """
    read(model, call, thread)
    if field(model, tables.TILED) != 0:
        end_tiles()
