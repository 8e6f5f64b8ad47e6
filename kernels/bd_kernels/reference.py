"""The reference: each operation written as plainly as possible. Slow on purpose; fast paths are tested against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Rotate = Callable[[Tensor, int], Tensor]  # (x [..., D], position) -> x rotated to that position


def seen_positions(t: int, sinks: int, chosen: Sequence[int], window: int) -> tuple[list[int], list[int]]:
    """Positions the query at t sees: (sinks and chosen chunks, recents), each in text order, none twice."""
    front = [*range(min(sinks, t + 1)), *chosen]
    return front, list(range(max(sinks, t - window + 1), t + 1))


def budget_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t: int,
    sinks: int,
    chosen: Sequence[int],
    window: int,
    rebased: bool,
    rotate: Rotate,
) -> Tensor:
    """Output [D] of one query head under a view.

    q [D] at position t, k and v [n, D] of its KV head for positions 0..n-1, all unrotated. With `rebased`, a sink or
    chosen key stands at its rank in text order within the view, and the query at its own rank when it looks at them;
    recents and the query looking at them stand at their true positions. One softmax over both.
    """
    front, recent = seen_positions(t, sinks, chosen, window)
    query_rank = len(front) + len(recent) - 1
    scores = []
    for rank, p in enumerate(front):
        key = rotate(k[p], rank if rebased else p)
        scores.append(rotate(q, query_rank if rebased else t) @ key)
    scores += [rotate(q, t) @ rotate(k[p], p) for p in recent]
    weights = (torch.stack(scores) * q.shape[-1] ** -0.5).softmax(0)
    return weights @ v[front + recent]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., D] rotated by rows cos and sin that broadcast to it, sin with its first half negated."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def attend(scores: Tensor, seen: Tensor, v: Tensor) -> Tensor:
    """Softmax in at least fp32, then weighted values. scores [N, R, Hkv, G, K], seen [N, R, K], v [N, Hkv, K, D]."""
    scores = scores * v.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen[:, :, None, None], -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(v.dtype, torch.float32)).to(v.dtype)
    used = v.masked_fill(~seen.any(1)[:, None, :, None], 0)  # what nobody sees may hold anything, and 0 · NaN is NaN
    return torch.einsum("nrhgk,nhkd->nrhgd", weights, used).flatten(2, 3)


def draft_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    sinks: int,
    chosen: int,
    window: int,
    ring: int,
    *,
    q_rank: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    index: Tensor | None = None,
    ring_start: int | None = None,
) -> Tensor:
    """`budget_attention` for a cache of slots; arguments as `bd_kernels.draft_attention`. Returns [N, R, H, D]."""
    n, rows, heads, dim = q.shape
    kv_heads, device = k.shape[1], k.device
    at = position[:, None] + torch.arange(rows, device=device)  # [N, R]
    if rope is not None:
        ranks = at.clamp(max=sinks + chosen + window - 1)
        q, q_rank = (rotated(q, *(table[place][:, :, None] for table in rope)) for place in (at, ranks))
    q_rank = q if q_rank is None else q_rank

    entries = torch.arange(sinks + chosen, device=device)
    recent = torch.arange(ring, device=device)
    newest = at[:, -1:]
    held = newest - (newest - recent) % ring  # [N, ring]
    in_front = (entries >= sinks) | (entries <= at[..., None])
    in_window = (held >= sinks)[:, None] & (held[:, None] <= at[..., None]) & (held[:, None] > at[..., None] - window)
    seen = torch.cat((in_front, in_window), -1)

    slots = torch.cat((entries, recent + (sinks + chosen if ring_start is None else ring_start)))
    slots = slots.expand(n, kv_heads, -1).clone()
    if index is not None:
        slots[:, :, sinks : sinks + chosen] = index
    gather = slots[..., None].expand(-1, -1, -1, dim)
    k, v = k.gather(2, gather), v.gather(2, gather)
    grouped = (n, rows, kv_heads, heads // kv_heads, dim)
    front, back = k.split((sinks + chosen, ring), 2)
    scores = torch.cat((
        torch.einsum("nrhgd,nhkd->nrhgk", q_rank.reshape(grouped), front),
        torch.einsum("nrhgd,nhkd->nrhgk", q.reshape(grouped), back),
    ), -1)  # fmt: skip
    return attend(scores, seen, v)


def verify_attention(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    """New rows q [N, R, H, D] over k and v [N, Hkv, capacity, D]; row r sees slots 0 .. length[n] + r."""
    n, rows, heads, dim = q.shape
    last = length[:, None] + torch.arange(rows, device=k.device)
    seen = torch.arange(k.shape[2], device=k.device) <= last[..., None]
    grouped = q.reshape(n, rows, k.shape[1], heads // k.shape[1], dim)
    return attend(torch.einsum("nrhgd,nhkd->nrhgk", grouped, k), seen, v)


def rotate_store(
    qk: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    slots: Tensor,
    rope: tuple[Tensor, Tensor],
    rotate_q: bool,
) -> Tensor:
    """Rows into keys and values [Hkv, slots, D] and queries out, as `bd_kernels.between`."""
    heads = qk.shape[1] - v.shape[1]
    turned = rotated(qk, *(table[positions][:, None] for table in rope))
    keys.index_copy_(1, slots, turned[:, heads:].transpose(0, 1))
    values.index_copy_(1, slots, v.transpose(0, 1))
    return (turned if rotate_q else qk)[:, :heads]


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, E] += y in place; RMS norm of the sum times weight [E]."""
    return torch.nn.functional.rms_norm(x.add_(y), weight.shape, weight, eps)


def gate(gate_up: Tensor) -> Tensor:
    """silu(g)·u [T, I] of rows [g | u] [T, 2·I]."""
    g, u = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(g) * u


def chunk_scores(queries: Tensor, keys: Tensor, chunk: int, *, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Scores [Hkv, C]: mean of queries [m, H, D] · mean key of each chunk of keys [C·chunk, Hkv, D] / √D, per group."""
    kv_heads, dim = keys.shape[1:]
    keys = keys.view(-1, chunk, kv_heads, dim)
    if rope is not None:
        keys = rotated(keys, *(table[None, :, None] for table in rope))
    query = queries.mean(0).view(kv_heads, -1, dim).sum(1)
    return torch.einsum("hd,chd->hc", query, keys.mean(1)) * dim**-0.5


def official_scores(keys: Tensor, chunk: int) -> Tensor:
    """The paper's scores [Hkv, C]: last key · mean key of each whole chunk of keys [n, Hkv, D]; chunk 0 first."""
    whole = keys.shape[0] // chunk
    centre = keys[: whole * chunk].view(whole, chunk, *keys.shape[1:]).mean(1)
    scores = torch.einsum("hd,chd->hc", keys[-1], centre)
    scores[:, 0] = torch.inf
    return scores


def compact(
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    kept_keys: Tensor,
    kept_values: Tensor,
    *,
    rope: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Entries index [Hkv, K] of keys and values [n, Hkv, D] into kept_* [Hkv, K, D], keys rotated to rows of `rope`."""
    gather = index.long()[..., None].expand(-1, -1, keys.shape[-1])
    chosen = keys.transpose(0, 1).gather(1, gather)
    kept_keys.copy_(chosen if rope is None else rotated(chosen, *rope))
    kept_values.copy_(values.transpose(0, 1).gather(1, gather))


def loss_rows(
    z: Tensor, y: Tensor, kind: str, temperature: float = 1.0, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, α, hits), each [T], as `bd_kernels.head_loss`; the gradient, which z becomes, by plain autograd."""
    wide = torch.promote_types(z.dtype, torch.float32)
    with torch.enable_grad():
        leaf = z.detach().to(wide).requires_grad_()
        log_q, log_p = ((x.to(wide) / temperature).log_softmax(-1) for x in (leaf, y.detach()))
        best = log_p.argmax(-1)
        kl = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0).sum(-1)
        overlap = torch.where(log_q < log_p, log_q, log_p)  # a tie counts as p's, a constant
        log_alpha = overlap.logsumexp(-1)
        mix = (-3 * log_alpha.exp().detach()).exp()
        losses = {
            "ce": -log_q.gather(-1, best[:, None])[:, 0],
            "kl": kl,
            "log_alpha": -log_alpha,
            "lk": mix * kl + (1 - mix) * (1 - log_alpha.exp()),
        }[kind]
        finite = log_q.logsumexp(-1).isfinite() & log_p.logsumexp(-1).isfinite()
        losses, alpha = (x.where(finite, torch.nan) for x in (losses, log_alpha.exp()))
        if scale is not None:
            z.copy_(torch.autograd.grad((losses * scale).sum(), leaf)[0])
    return losses.detach(), alpha.detach(), (log_q.argmax(-1) == best) & finite


def accept_greedy(
    draft: Tensor, logits: Tensor, ids: Tensor | None = None, length: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(tokens [N, γ+1], accepted [N]) of drafts [N, γ] against logits [N, γ+1, V]; see `bd_kernels.accept`."""
    top, best = logits.max(-1)
    accepted = (draft == best[:, :-1]).cumprod(1).sum(1)
    return _commit(best, accepted.where(top.isfinite().all(1), -1), ids, length)


def accept_sampled(
    draft: Tensor,
    q: Tensor,
    p: Tensor,
    uniform: Tensor,
    ids: Tensor | None = None,
    length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same for drafts drawn from q [N, γ, V], against p [N, γ+1, V] and with uniform [N, γ+1]."""
    n, gamma = draft.shape
    drawn_p, drawn_q = (x[:, :gamma].gather(2, draft[..., None])[..., 0] for x in (p, q))
    accepted = (uniform[:, :gamma] * drawn_q < drawn_p).cumprod(1).sum(1)
    row = accepted[:, None, None].expand(-1, 1, p.shape[-1])
    left = p.gather(1, row)[:, 0].double()
    none = torch.zeros_like(p[:, :1])  # after γ acceptances there is nothing to subtract
    residual = (left - torch.cat((q[:, :gamma], none), 1).gather(1, row)[:, 0].double()).clamp_min(0)  # keeps a NaN
    left = left.where(residual.sum(-1, keepdim=True) == 0, residual)
    total = left.sum(-1, keepdim=True)
    passed = (left.cumsum(-1) > uniform[:, gamma:] * total) & (left > 0)
    # argmax finds the first; where rounding leaves none passed, the token is the last one with mass
    last = left.shape[-1] - 1 - (left > 0).flip(-1).int().argmax(-1)
    drawn = passed.int().argmax(-1).where(passed.any(-1), last)
    broken = torch.cat((drawn_p, drawn_q), 1).isnan().any(1) | ~((total > 0) & total.isfinite())[:, 0]
    tokens = torch.cat((draft, draft[:, :0].new_zeros(n, 1)), 1).scatter(1, accepted[:, None], drawn[:, None])
    return _commit(tokens, accepted.where(~broken, -1), ids, length)


def _commit(tokens: Tensor, accepted: Tensor, ids: Tensor | None, length: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keep tokens [N, γ+1] up to `accepted` [N], -1 behind; append them to ids [N, capacity] at length [N]."""
    keep = torch.arange(tokens.shape[1], device=tokens.device) <= accepted[:, None]
    if ids is not None:
        offset = torch.arange(ids.shape[1], device=ids.device) - length[:, None]
        new = tokens.gather(1, offset.clamp(0, tokens.shape[1] - 1))
        ids.copy_(new.where((offset >= 0) & (offset <= accepted[:, None]), ids))
        length += accepted + 1
    return tokens.where(keep, -1), accepted.int()
