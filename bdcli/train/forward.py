"""The drafter's forward for training: every position of a text at once, under several budgeted views, with gradients.

The views are those of the decode caches (`bdcli.cache.view`): a position's logits here equal what `BudgetCache` gives
the same token while decoding (a parity test compares them). All views of a text are stacked on the row axis, so that
every linear layer runs once over all of them; only attention is taken view by view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bdcli.backends.causal import causal_attention
from bdcli.cache.chunks import SCORING_QUERIES
from bdcli.cache.view import FullView, OfficialView, View
from bdcli.model.llama import PREFILL_BLOCK, Layer, Model
from bdcli.model.rope import RopeTable

MIN_BLOCK, MAX_BLOCK = 128, 512  # query rows of a block: narrower ones cost overhead, wider ones read too many keys


def view_hidden(model: Model, rope: RopeTable, ids: Tensor, views: Sequence[View | FullView]) -> Tensor:
    """Residual rows before the final norm, [R, T, hidden], of token ids [T] under each of R views.

    Views that choose chunks depend on where the prompt ends: see `anchored_hidden`.
    """
    c, length = model.config, ids.shape[0]
    x = F.embedding(ids, model.embedding)
    qk, v = model.project(model.layers[0], x)
    x = x.expand(len(views), -1, -1)
    for i, layer in enumerate(model.layers):
        if i == 0:  # before any attention all views are the same
            attended = torch.stack([attend(rope, qk, v, view) for view in views])
        else:
            qk, v = model.project(layer, x.flatten(0, 1))
            rows = zip(qk.view(len(views), length, *qk.shape[1:]), v.view(len(views), length, *v.shape[1:]), views)
            attended = torch.stack([attend(rope, *row) for row in rows])
        x = model.mix(layer, x.reshape(-1, c.hidden_size), attended.flatten(0, 1)).view(len(views), length, -1)
    return x


def causal_hidden(model: Model, rope: RopeTable, ids: Tensor, block=None, positions: Tensor | None = None) -> Tensor:
    """Residual rows before the final norm, [N, T, hidden], of N texts ids [N, T], each seeing its whole past.

    `block` may be a compiled `causal_block`. `positions` [T] are those of every text, 0..T-1 when None.
    """
    cos, sin = rope.rows(slice(0, ids.shape[1]) if positions is None else positions)
    x = F.embedding(ids.flatten(), model.embedding)
    for layer in model.layers:
        x = (block or causal_block)(model, layer, x, cos, sin, ids.shape[0])
    return x.view(*ids.shape, -1)


@torch.no_grad()
def final_rows(model: Model, ids: Tensor) -> Tensor:
    """Normed last hidden states [T, hidden] of one text ids [T] that sees its whole past: what the lm head reads.

    One layer's queries, keys and values live at a time, and a block of rows of its MLP.
    """
    c, rows = model.config, range(0, ids.shape[0], PREFILL_BLOCK)
    rope = RopeTable(c.rope, ids.shape[0], ids.shape[0], model.dtype, model.device)
    x = F.embedding(ids, model.embedding)
    for layer in model.layers:
        q, k, v = (x.new_empty(ids.shape[0], n, c.head_dim) for n in (c.heads, c.kv_heads, c.kv_heads))
        for part in (slice(a, a + PREFILL_BLOCK) for a in rows):
            qk, v[part] = model.project(layer, x[part])
            q[part], k[part] = rope.rotate(qk, rope.rows(part)).split((c.heads, c.kv_heads), 1)
        out = causal_attention(q[None], k[None], v[None])[0]
        del q, k, v
        for part in (slice(a, a + PREFILL_BLOCK) for a in rows):
            x[part] = model.mix(layer, x[part], out[part])
    return F.rms_norm(x, x.shape[-1:], model.norm, c.norm_eps)


def causal_block(model: Model, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, texts: int) -> Tensor:
    """One layer on x [N·T, hidden] of N texts of equal length; cos and sin [T, 1, D] as `RopeTable` makes them."""
    c, half = model.config, model.config.head_dim // 2
    qk, v = model.project(layer, x)
    qk, v = qk.unflatten(0, (texts, -1)), v.unflatten(0, (texts, -1))
    qk = qk * cos + torch.cat((qk[..., half:], qk[..., :half]), -1) * sin
    out = causal_attention(qk[:, :, : c.heads], qk[:, :, c.heads :], v)
    return model.mix(layer, x, out.flatten(0, 1))


def anchored_hidden(
    model: Model, rope: RopeTable, ids: Tensor, start: int, view: View | OfficialView, prefix_gradients: str = "full"
) -> Tensor:
    """Residual rows before the final norm, [T - start, hidden], of ids[start:] decoded after a prefill of ids[:start].

    `view` chooses chunks of the prefix. What the prefix's keys and values learn: `none`; `selected`, those that are
    kept learn down to their own layer's input; `full`, the prefix learns through all layers.
    """
    x = F.embedding(ids, model.embedding)
    for i, layer in enumerate(model.layers):
        if prefix_gradients != "full":
            x = torch.cat((x[:start].detach(), x[start:]))
        qk, v = model.project(layer, x)
        if prefix_gradients == "none":
            qk, v = (torch.cat((t[:start].detach(), t[start:])) for t in (qk, v))
        continued = _attend_after(rope, qk, v, start, view)
        if i == len(model.layers) - 1:
            return model.mix(layer, x[start:], continued)
        x = model.mix(layer, x, torch.cat((attend(rope, qk[:start], v[:start], view.reading()), continued)))
    raise ValueError("a model without layers")


class _KeptPrefix(NamedTuple):
    """Keys and values [K, Hkv, D] of a prefix that every later query sees: sinks, then chosen chunks."""

    keys: Tensor
    values: Tensor


def _attend_after(rope: RopeTable, qk: Tensor, v: Tensor, start: int, view: View | OfficialView) -> Tensor:
    """Attention output [T - start, H·D] of positions start.., which see what is kept of the prefix and recent keys.

    qk [T, H+Hkv, D] unrotated, v [T, Hkv, D]. With rebased positions a query looks at the kept prefix from the view's
    last rank, and at recent keys from its own position.
    """
    length, kv_heads, dim = v.shape
    heads = qk.shape[1] - kv_heads
    rotated = rope.rotate(qk, rope.rows(slice(0, length)))
    q, k = rotated[start:, :heads], rotated[:, heads:]
    q_prefix = _from_last_rank(rope, qk[start:, :heads], view) if view.rebased else q
    prefix = _keep_prefix(rope, qk, rotated, v, start, view)
    first = view.first_recent(start)
    positions = torch.arange(length, device=v.device)
    seen = view.allowed(positions[start:], positions[first:])
    queries = torch.cat((q, q_prefix), -1)
    keys = torch.cat((_second_half(prefix.keys), _first_half(k[first:])))
    values = _first_half(torch.cat((prefix.values, v[first:])))
    mask = torch.cat((seen.new_ones(length - start, prefix.keys.shape[0]), seen), 1)
    queries, keys, values = (t.transpose(0, 1)[None] for t in (queries, keys, values))
    gqa = heads != kv_heads
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=dim**-0.5, enable_gqa=gqa)
    return out[0, ..., :dim].transpose(0, 1).reshape(length - start, -1)


def _keep_prefix(
    rope: RopeTable, qk: Tensor, rotated: Tensor, v: Tensor, start: int, view: View | OfficialView
) -> _KeptPrefix:
    """What a prefill of `start` positions leaves; `rotated` is qk at its positions. The choice learns nothing."""
    heads, dim = qk.shape[1] - v.shape[1], v.shape[2]
    k, raw_k = rotated[:, heads:], qk[:, heads:]
    last = slice(max(0, start - SCORING_QUERIES), start)
    scoring = _from_last_rank(rope, qk[last, :heads], view) if view.rebased else rotated[last, :heads]
    chosen = view.choose(rope, scoring.detach(), k[:start].detach(), raw_k[:start].detach())
    index = chosen.T[..., None].expand(-1, -1, dim)
    chosen_k, chosen_v = (raw_k if view.rebased else k).gather(0, index), v.gather(0, index)
    if view.rebased:
        chosen_k = rope.rotate(chosen_k, rope.rows(slice(view.sinks, view.prefix)))
    return _KeptPrefix(torch.cat((k[: view.sinks], chosen_k)), torch.cat((v[: view.sinks], chosen_v)))


def _from_last_rank(rope: RopeTable, raw_q: Tensor, view: View) -> Tensor:
    """Queries [T, H, D] rotated as those of a full view, which all stand at its last rank."""
    return rope.rotate(raw_q, rope.rows(slice(view.last_rank, view.last_rank + 1)))


# Two rotations of a query inside one softmax make one ordinary attention: the rotated queries stand side by side on
# the head dimension, [.., 2·D], against keys that are zero in the other half.


def _first_half(x: Tensor) -> Tensor:
    return F.pad(x, (0, x.shape[-1]))


def _second_half(x: Tensor) -> Tensor:
    return F.pad(x, (x.shape[-1], 0))


def attend(rope: RopeTable, qk: Tensor, v: Tensor, view: View | FullView) -> Tensor:
    """Attention output [T, H·D] of one text in which nothing is chosen; qk [T, H+Hkv, D] unrotated, v [T, Hkv, D]."""
    length, kv_heads = v.shape[:2]
    heads = qk.shape[1] - kv_heads
    rotated = rope.rotate(qk, rope.rows(slice(0, length)))
    q, k = rotated[:, :heads], rotated[:, heads:]
    if view.covers(length):
        return causal_attention(q[None], k[None], v[None])[0]
    if view.rebased:
        ranks = torch.arange(length, device=v.device).clamp(max=view.last_rank)
        q_rank = rope.rotate(qk[:, :heads], rope.rows(ranks))
    else:
        q_rank = q
    return _banded(q, q_rank, k, v, view)


def _banded(q: Tensor, q_rank: Tensor, k: Tensor, v: Tensor, view: View) -> Tensor:
    """Sinks and the last `window` keys, in blocks of queries that see their own block of keys and those before it.

    Under rebased positions a query looks at sinks with one rotation, `q_rank`, and at recent keys with another, `q`.
    """
    length, heads, dim = q.shape
    block = min(max(view.window, MIN_BLOCK), MAX_BLOCK)
    count, before = -(-length // block), -(-(view.window - 1) // block)

    def blocks(x: Tensor) -> Tensor:  # [T, H, D] -> [blocks, H, block, D]
        x = F.pad(x, (0, 0, 0, 0, 0, count * block - length))
        return x.view(count, block, *x.shape[1:]).transpose(1, 2)

    def with_past(x: Tensor, sinks: Tensor) -> Tensor:  # [blocks, Hkv, S + (before + 1)·block, ·]
        padded = F.pad(blocks(x), (0, 0, 0, 0, 0, 0, before, 0))
        shifted = [padded[i : i + count] for i in range(before + 1)]
        return torch.cat((sinks.transpose(0, 1).expand(count, -1, -1, -1), *shifted), 2)

    sinks_k, sinks_v = k[: view.sinks], v[: view.sinks]
    if q_rank is not q:
        queries = torch.cat((blocks(q), blocks(q_rank)), -1)
        keys = with_past(_first_half(k), _second_half(sinks_k))
        values = _first_half(with_past(v, sinks_v))
    else:
        queries, keys, values = blocks(q), with_past(k, sinks_k), with_past(v, sinks_v)
    mask = _band_mask(count, block, before, view, q.device)
    gqa = heads != k.shape[1]
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=dim**-0.5, enable_gqa=gqa)
    return out[..., :dim].transpose(1, 2).reshape(count * block, heads * dim)[:length]


def _band_mask(count: int, block: int, before: int, view: View, device: torch.device) -> Tensor:
    """Bool [blocks, 1, block, S + (before + 1)·block]: which of sinks, earlier and own block each query sees."""
    starts = torch.arange(count, device=device)[:, None] * block
    queries = (starts + torch.arange(block, device=device))[:, :, None]
    recents = (starts - before * block + torch.arange((before + 1) * block, device=device))[:, None, :]
    sinks = torch.arange(view.sinks, device=device)
    near = (recents >= view.sinks) & (recents <= queries) & (recents > queries - view.window)
    return torch.cat(((sinks <= queries), near), -1)[:, None]
