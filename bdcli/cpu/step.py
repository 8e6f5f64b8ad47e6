"""One forward, or one whole draft, as compiled code that every thread of the pool runs side by side.

A forward is a chain of phases with a barrier between them; in a phase, threads claim tasks (a head, a chunk of the KV
cache, a tile of weight rows) until none is left. What is cheap and needed by all, such as a norm, each thread makes for
itself. Weights and keys are read from memory once whatever the number of rows, and a row's result never depends on
the other rows or on the number of threads, so that verifying several tokens writes what plain decoding would.
"""

from __future__ import annotations

from numba import types

from bdcli.cpu import layout as of
from bdcli.cpu.attention import attend, merge, project_head, unseen_ranges, used_slots
from bdcli.cpu.draws import best, draw
from bdcli.cpu.layout import field
from bdcli.cpu.micro import PAIRS
from bdcli.cpu.rows import add_linear, embed, gate, linear, normed
from bdcli.cpu.simd import get_i64, machine_code, put_i64
from bdcli.cpu.threads import barrier, claim


@machine_code(types.void, *[types.int64] * 5)
def logits_of(model, call, phase, x, rows):
    """Tiles of the lm head."""
    vocab, hidden, kind = field(model, of.VOCAB), field(model, of.HIDDEN), field(model, of.KIND)
    task = claim(call, phase)
    while task * of.TILE_COLUMNS < vocab:
        first = task * of.TILE_COLUMNS
        count = min(of.TILE_COLUMNS, vocab - first)
        weight = field(model, of.HEAD) + first * hidden * (2 if kind == PAIRS else 4)
        linear(kind, weight, hidden, x, rows, field(call, of.LOGITS) + 4 * first, 4 * vocab, count)
        task = claim(call, phase)


@machine_code(types.int64, *[types.int64] * 8)
def forward(model, call, thread, phase, start, rows, tokens, logit_rows):
    """Append `rows` tokens at positions start.. and leave logits of the last `logit_rows`; returns the next phase."""
    own = field(call, of.OWN) + thread * field(call, of.OWN_BYTES)
    x, ready = field(call, of.X), own + field(call, of.NARROW)
    heads, kv_heads = field(model, of.HEADS), field(model, of.KV_HEADS)
    hidden, inner, width = field(model, of.HIDDEN), field(model, of.INNER), heads * field(model, of.DIM)
    used = used_slots(model, start, rows)
    chunks = -(-used // of.CHUNK)
    unseen_ranges(model, own + field(call, of.UNSEEN), start, rows)
    embed(model, call, thread, rows, tokens)
    phase = barrier(call, thread, phase)
    for i in range(field(model, of.LAYERS)):
        layer = model + 8 * (of.MODEL_FIELDS + i * of.LAYER_FIELDS)
        normed(model, x, rows, field(layer, of.ATTENTION_NORM), ready)
        task = claim(call, phase)
        while task < heads + 2 * kv_heads:
            project_head(model, layer, call, own, start, rows, task)
            task = claim(call, phase)
        phase = barrier(call, thread, phase)
        task = claim(call, phase)
        while task < kv_heads * chunks:
            attend(model, layer, call, own, rows, task // chunks, task % chunks, chunks, used)
            task = claim(call, phase)
        phase = barrier(call, thread, phase)
        merge(model, call, own, rows, chunks)
        task = claim(call, phase)
        while task < hidden // 16:
            add_linear(model, call, own, rows, width, field(layer, of.OUT), field(layer, of.OUT_BIAS), ready, task)
            task = claim(call, phase)
        phase = barrier(call, thread, phase)
        normed(model, x, rows, field(layer, of.MLP_NORM), ready)
        task = claim(call, phase)
        while task < inner // 32:
            gate(model, layer, call, own, rows, task)
            task = claim(call, phase)
        phase = barrier(call, thread, phase)
        task = claim(call, phase)
        gated = field(call, of.GATED)
        while task < hidden // 16:
            add_linear(model, call, own, rows, inner, field(layer, of.DOWN), field(layer, of.DOWN_BIAS), gated, task)
            task = claim(call, phase)
        phase = barrier(call, thread, phase)
    if logit_rows > 0:
        normed(model, x + 4 * hidden * (rows - logit_rows), logit_rows, field(model, of.FINAL_NORM), ready)
        logits_of(model, call, phase, ready, logit_rows)
    return barrier(call, thread, phase)


@machine_code(types.void, *[types.int64] * 3)
def run(model, call, thread):
    """A plain forward over ROWS tokens, or, with DRAFT > 0, as many forwards as there are tokens to draft.

    Drafted tokens are appended to TOKENS; the last one is not read.
    """
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
