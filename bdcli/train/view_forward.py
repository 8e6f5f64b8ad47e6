"""The drafter's forward for training: every position of a text at once, under several budgeted views, with gradients.

The same law as the decode caches (`bdcli.views`): a position's logits here equal what `BudgetCache` gives the same
token while decoding (a parity test holds the two together). All views of a text are stacked on the row axis, so that
every linear layer runs once over all of them; only attention is taken view by view.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bdcli.model import Layer, Model
from bdcli.rope import RopeTable
from bdcli.views import View

MIN_BLOCK, MAX_BLOCK = 128, 512  # query rows of a block: narrower ones cost overhead, wider ones read too many keys


def view_hidden(model: Model, rope: RopeTable, ids: Tensor, views: Sequence[View | None]) -> Tensor:
    """Residual rows before the final norm, [R, T, hidden], of token ids [T] under each of R views.

    A view None is the full causal cache at absolute positions; a View is `window` selection (nothing chosen).
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


def causal_hidden(model: Model, rope: RopeTable, ids: Tensor, block=None) -> Tensor:
    """Residual rows before the final norm, [N, T, hidden], of N texts ids [N, T], each seeing its whole past.

    `block` may be a compiled `causal_block`.
    """
    cos, sin = rope.rows(slice(0, ids.shape[1]))
    x = F.embedding(ids.flatten(), model.embedding)
    for layer in model.layers:
        x = (block or causal_block)(model, layer, x, cos, sin, ids.shape[0])
    return x.view(*ids.shape, -1)


def causal_block(model: Model, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, texts: int) -> Tensor:
    """One layer on x [N·T, hidden] of N texts of equal length; cos and sin [T, 1, D] as `RopeTable` makes them."""
    c, half = model.config, model.config.head_dim // 2
    qk, v = model.project(layer, x)
    qk, v = qk.unflatten(0, (texts, -1)), v.unflatten(0, (texts, -1))
    qk = qk * cos + torch.cat((qk[..., half:], qk[..., :half]), -1) * sin
    q, k, v = (t.transpose(1, 2) for t in (qk[:, :, : c.heads], qk[:, :, c.heads :], v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=c.heads != c.kv_heads)
    return model.mix(layer, x, out.transpose(1, 2).reshape(x.shape[0], -1))


def attend(rope: RopeTable, qk: Tensor, v: Tensor, view: View | None) -> Tensor:
    """Attention output [T, H·D] of one text; qk [T, H+Hkv, D] unrotated, v [T, Hkv, D]."""
    length, kv_heads = v.shape[:2]
    heads = qk.shape[1] - kv_heads
    rotated = rope.rotate(qk, rope.rows(slice(0, length)))
    q, k = rotated[:, :heads], rotated[:, heads:]
    if view is None or length <= view.sinks + view.window:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
        return out[0].transpose(0, 1).reshape(length, -1)
    if view.rebased:
        ranks = torch.arange(length, device=v.device).clamp(max=view.last_rank)
        q_rank = rope.rotate(qk[:, :heads], rope.rows(ranks))
    else:
        q_rank = q
    return _banded(q, q_rank, k, v, view)


def _banded(q: Tensor, q_rank: Tensor, k: Tensor, v: Tensor, view: View) -> Tensor:
    """Sinks and the last `window` keys, in blocks of queries that see their own block of keys and those before it.

    Under rebased positions a query looks at sinks with one rotation and at recents with another, inside one softmax.
    Putting the two side by side on the head dimension, against keys that are zero in the other half, makes that one
    ordinary attention.
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
        keys = with_past(F.pad(k, (0, dim)), F.pad(sinks_k, (dim, 0)))
        values = F.pad(with_past(v, sinks_v), (0, dim))
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
