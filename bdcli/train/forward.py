"""The drafter's forward for training: every position of a text at once, under several budgeted views, with gradients.

The same law as the decode caches (`bdcli.cache.view`): a position's logits here equal what `BudgetCache` gives the same
token while decoding (a parity test holds the two together). All views of a text are stacked on the row axis, so that
every linear layer runs once over all of them; only attention is taken view by view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bdcli.cache.chunks import SCORING_QUERIES, official_chunks, prompt_chunks
from bdcli.cache.view import CHUNK_KEYS, View
from bdcli.model.llama import PREFILL_BLOCK, Layer, Model
from bdcli.model.rope import RopeTable

MIN_BLOCK, MAX_BLOCK = 128, 512  # query rows of a block: narrower ones cost overhead, wider ones read too many keys


def view_hidden(model: Model, rope: RopeTable, ids: Tensor, views: Sequence[View | None]) -> Tensor:
    """Residual rows before the final norm, [R, T, hidden], of token ids [T] under each of R views.

    A view None is the full causal cache at absolute positions; a View is `window` selection (nothing chosen).
    Selections that choose from a prompt depend on where it ends: see `anchored_hidden`.
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
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=c.heads != c.kv_heads)
        del q, k, v
        out = out[0].transpose(0, 1).reshape(ids.shape[0], -1)
        for part in (slice(a, a + PREFILL_BLOCK) for a in rows):
            x[part] = model.mix(layer, x[part], out[part])
    return F.rms_norm(x, x.shape[-1:], model.norm, c.norm_eps)


def causal_block(model: Model, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, texts: int) -> Tensor:
    """One layer on x [N·T, hidden] of N texts of equal length; cos and sin [T, 1, D] as `RopeTable` makes them."""
    c, half = model.config, model.config.head_dim // 2
    qk, v = model.project(layer, x)
    qk, v = qk.unflatten(0, (texts, -1)), v.unflatten(0, (texts, -1))
    qk = qk * cos + torch.cat((qk[..., half:], qk[..., :half]), -1) * sin
    q, k, v = (t.transpose(1, 2) for t in (qk[:, :, : c.heads], qk[:, :, c.heads :], v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=c.heads != c.kv_heads)
    return model.mix(layer, x, out.transpose(1, 2).reshape(x.shape[0], -1))


def anchored_hidden(
    model: Model, rope: RopeTable, ids: Tensor, start: int, view: View | int, prefix_gradients: str = "full"
) -> Tensor:
    """Residual rows before the final norm, [T - start, hidden], of ids[start:] decoded after a prefill of ids[:start].

    `view` has chosen chunks (`chunk` selection), or is the budget of the paper's `official` selection. What the keys
    and values of the prefix learn: `none`; `selected`, those that are kept learn down to their own layer's input;
    `full`, the prefix learns through all layers.
    """
    x = F.embedding(ids, model.embedding)
    for i, layer in enumerate(model.layers):
        if prefix_gradients != "full":
            x = torch.cat((x[:start].detach(), x[start:]))
        qk, v = model.project(layer, x)
        if prefix_gradients == "none":
            qk, v = (torch.cat((t[:start].detach(), t[start:])) for t in (qk, v))
        after = _continued(rope, qk, v, start, view)
        if i == len(model.layers) - 1:
            return model.mix(layer, x[start:], after)
        x = model.mix(layer, x, torch.cat((attend(rope, qk[:start], v[:start], _prompt_view(view)), after)))
    raise ValueError("a model without layers")


def _prompt_view(view: View | int) -> View | None:
    """How a prompt reads itself before anything is chosen of it, as the decode caches have it."""
    if isinstance(view, int) or not view.rebased:
        return None
    return replace(view, budget=view.budget - view.chosen, chosen=0)


def _continued(rope: RopeTable, qk: Tensor, v: Tensor, start: int, view: View | int) -> Tensor:
    """Attention output [T - start, H·D] of positions start.., which see what was kept of the prefix and each other."""
    length, kv_heads, dim = v.shape
    heads = qk.shape[1] - kv_heads
    rotated, raw_k = rope.rotate(qk, rope.rows(slice(0, length))), qk[:, heads:]
    q, k = rotated[start:, :heads], rotated[:, heads:]
    at = torch.arange(length, device=v.device)
    if isinstance(view, int):
        kept = official_chunks(k[:start].detach(), view, CHUNK_KEYS)
        first, kept_k, q_rank, sinks = start, k, q, 0
        seen = at[start:] <= at[start:, None]
    else:
        raw_q = qk[start - SCORING_QUERIES : start, :heads] if start > SCORING_QUERIES else qk[:start, :heads]
        last = rope.rows(slice(view.last_rank, view.last_rank + 1))
        asking = rope.rotate(raw_q, last) if view.rebased else rotated[:start, :heads][-SCORING_QUERIES:]
        kept = prompt_chunks(rope, view, asking.detach(), k[:start].detach(), raw_k[:start].detach())
        first, kept_k, sinks = start - view.window + 1, raw_k if view.rebased else k, view.sinks
        q_rank = rope.rotate(qk[start:, :heads], last) if view.rebased else q
        seen = view.allowed(at[start:], at[first:])
    index = kept.T[..., None].expand(-1, -1, dim)
    kept_k, kept_v = kept_k.gather(0, index), v.gather(0, index)
    if not isinstance(view, int) and view.rebased:
        kept_k = rope.rotate(kept_k, rope.rows(slice(view.sinks, view.prefix)))
    prefix_k, prefix_v = torch.cat((k[:sinks], kept_k)), torch.cat((v[:sinks], kept_v))
    # two rotations of a query inside one softmax: side by side, against keys that are zero in the other half
    queries = torch.cat((q, q_rank), -1)
    keys = torch.cat((F.pad(prefix_k, (dim, 0)), F.pad(k[first:], (0, dim))))
    values = F.pad(torch.cat((prefix_v, v[first:])), (0, dim))
    mask = torch.cat((seen.new_ones(length - start, prefix_k.shape[0]), seen), 1)
    queries, keys, values = (t.transpose(0, 1)[None] for t in (queries, keys, values))
    gqa = heads != kv_heads
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=dim**-0.5, enable_gqa=gqa)
    return out[0, ..., :dim].transpose(0, 1).reshape(length - start, -1)


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
