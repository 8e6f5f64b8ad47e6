"""One forward, or one whole draft, as compiled code that every thread of the pool runs side by side.

A forward is a chain of phases with a barrier between them; in a phase, threads claim tasks (a head, a chunk of the KV
cache, a tile of weight rows) until none is left. What is cheap and needed by all, such as a norm, each thread makes for
itself. Weights and keys are read from memory once whatever the number of rows, and a row's result never depends on
the other rows or on the number of threads, so that verifying several tokens writes what plain decoding would.
"""

from __future__ import annotations

from numba import njit, types

from bdcli.backends.cpu import tables as of
from bdcli.backends.cpu.amx import TILE_ROWS, end_tiles, shape_tiles
from bdcli.backends.cpu.attention import attend, merge, project_head, unseen_ranges, used_slots
from bdcli.backends.cpu.layers import add_linear, embed, gate, kind_of, linear, normed, size_of
from bdcli.backends.cpu.sampling import best, draw
from bdcli.backends.cpu.simd import get_i64, machine_code, put_i64
from bdcli.backends.cpu.tables import field
from bdcli.backends.cpu.threads import barrier, claim


@machine_code(types.void, *[types.int64] * 6)
def logits_of(model, call, own, phase, x, rows):
    """Tiles of the lm head."""
    vocab, hidden, kind = field(model, of.VOCAB), field(model, of.HIDDEN), kind_of(model, of.HEAD_TILES)
    corner = own + field(call, of.CORNER)
    task = claim(call, phase)
    while task * of.TILE_COLUMNS < vocab:
        first = task * of.TILE_COLUMNS
        count = min(of.TILE_COLUMNS, vocab - first)
        weight = field(model, of.HEAD) + first * hidden * size_of(kind)
        linear(kind, weight, hidden, x, rows, field(call, of.LOGITS) + 4 * first, 4 * vocab, count, corner)
        task = claim(call, phase)


@njit(error_model="numpy")
def shape_for_rows(model, call, rows):
    """Tiles of this thread multiply `rows` rows by weights from now on."""
    if field(model, of.TILED) != 0:
        shape_tiles(field(call, of.TILE_CONFIG) + 64 * (min(rows, TILE_ROWS) - 1))


@njit(error_model="numpy")
def shape_for_attention(model, call, rows):
    """Tiles of this thread multiply `rows` rows by panels from now on."""
    if field(model, of.TILED) & of.ATTENTION_TILES:
        shape_tiles(field(call, of.TILE_CONFIG) + 64 * (min(rows, TILE_ROWS) - 1 + TILE_ROWS))


@machine_code(types.int64, *[types.int64] * 8)
def forward(model, call, thread, phase, start, rows, tokens, logit_rows):
    """Append `rows` tokens at positions start.. and leave logits of the last `logit_rows`; returns the next phase."""
    own = field(call, of.OWN) + thread * field(call, of.OWN_BYTES)
    x, ready = field(call, of.X), own + field(call, of.NARROW)
    heads, kv_heads = field(model, of.HEADS), field(model, of.KV_HEADS)
    hidden, inner, width = field(model, of.HIDDEN), field(model, of.INNER), heads * field(model, of.DIM)
    qkv, out = kind_of(model, of.QKV_TILES), kind_of(model, of.OUT_TILES)
    gate_up, down = kind_of(model, of.GATE_UP_TILES), kind_of(model, of.DOWN_TILES)
    used = used_slots(model, start, rows)
    chunks = -(-used // of.CHUNK)
    unseen_ranges(model, own + field(call, of.UNSEEN), start, rows)
    embed(model, call, thread, rows, tokens)
    phase = barrier(call, thread, phase)
    for i in range(field(model, of.LAYERS)):
        layer = model + 8 * (of.MODEL_FIELDS + i * of.LAYER_FIELDS)
        shape_for_rows(model, call, rows)
        normed(model, x, rows, field(layer, of.ATTENTION_NORM), ready, qkv)
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
            add_linear(model, call, own, rows, width, field(layer, of.OUT), field(layer, of.OUT_BIAS), ready, task, out)
            task = claim(call, phase)
        phase = barrier(call, thread, phase)
        normed(model, x, rows, field(layer, of.MLP_NORM), ready, gate_up)
        task = claim(call, phase)
        while task < inner // 32:
            gate(model, layer, call, own, rows, task)
            task = claim(call, phase)
        phase = barrier(call, thread, phase)
        task = claim(call, phase)
        gated = field(call, of.GATED)
        while task < hidden // 16:
            add_linear(
                model, call, own, rows, inner, field(layer, of.DOWN), field(layer, of.DOWN_BIAS), gated, task, down
            )
            task = claim(call, phase)
        phase = barrier(call, thread, phase)
    if logit_rows > 0:
        shape_for_rows(model, call, logit_rows)
        last, kind = x + 4 * hidden * (rows - logit_rows), kind_of(model, of.HEAD_TILES)
        normed(model, last, logit_rows, field(model, of.FINAL_NORM), ready, kind)
        logits_of(model, call, own, phase, ready, logit_rows)
    return barrier(call, thread, phase)


@machine_code(types.void, *[types.int64] * 3)
def read(model, call, thread):
    start, rows, tokens = field(call, of.START), field(call, of.ROWS), field(call, of.TOKENS)
    drafts = field(call, of.DRAFT)
    if drafts == 0:
        forward(model, call, thread, 0, start, rows, tokens, field(call, of.LOGIT_ROWS))
        return
    phase = 0
    for i in range(drafts):
        phase = forward(model, call, thread, phase, start, rows, tokens, 1)
        tokens += 8 * rows
        if thread == 0:
            put_i64(tokens, draw(call, i) if field(call, of.Q_ROWS) != 0 else best(call))
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
    if field(model, of.TILED) != 0:
        end_tiles()
