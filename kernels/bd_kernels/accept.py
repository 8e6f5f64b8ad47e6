"""Accept, recover, commit: from a round's draft and distributions to its tokens, without leaving the device.

Two kernels a verdict: the first reads the vocabulary in blocks with the whole chip, the second, one program a
sequence, decides and appends. NaN must never pass for an acceptance: a broken row yields accepted = -1, which the
host sees in the one copy it makes a round, and nothing is appended.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

GREEDY_WARPS = {"num_warps": 8}  # with 4, ptxas spills where the vocabulary has some 64 blocks
BLOCK_V = tl.constexpr(2048)  # vocabulary entries of one program
NONE = tl.constexpr(2**31 - 1)  # larger than any index


class Accepted(NamedTuple):
    """tokens [N, γ+1] int64: accepted drafts, then the recovered or bonus token, then -1; accepted [N] int32."""

    tokens: Tensor
    accepted: Tensor


@triton.jit
def _commit(tokens, accepted, r, gamma, n, TOKENS, ACCEPTED, IDS, LENGTH, id_stride, capacity, COMMIT: tl.constexpr):
    """Store the verdict and, with COMMIT, append its tokens to ids[n] at length[n], which grows by accepted + 1."""
    tl.store(TOKENS + n * (gamma + 1) + r, tl.where(r <= accepted, tokens, -1), mask=r <= gamma)
    tl.store(ACCEPTED + n, accepted)
    if COMMIT:
        length = tl.load(LENGTH + n)
        at = length + r
        tl.store(IDS + n * id_stride + at, tokens, mask=(r <= accepted) & (at < capacity))
        tl.debug_barrier()  # no thread may read a length that another has already moved
        tl.store(LENGTH + n, length + accepted + 1)


@triton.jit
def greedy_blocks_kernel(
    LOGITS,  # [N·(γ+1), V]
    TOP,  # [N·(γ+1), blocks] fp32; NaN where the block holds one
    BEST,  # [N·(γ+1), blocks] int32
    vocab,
    row_stride,
):
    row = tl.program_id(0)
    block = tl.program_id(1)
    token = block * BLOCK_V + tl.arange(0, BLOCK_V)
    at = LOGITS + row.to(tl.int64) * row_stride + token
    x = tl.load(at, mask=token < vocab, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 0)
    best = tl.min(tl.where(x == top, token, NONE), 0)  # the first of equals, like torch.argmax
    broken = tl.max((x != x).to(tl.int32), 0)
    out = row * tl.num_programs(1) + block
    tl.store(TOP + out, tl.where(broken > 0, float("nan"), top))
    tl.store(BEST + out, best)


@triton.jit
def greedy_commit_kernel(
    TOP,  # [N·(γ+1), blocks]
    BEST,
    DRAFT,  # [N, γ]
    TOKENS,  # [N, γ+1]
    ACCEPTED,  # [N]
    IDS,  # [N, capacity]
    LENGTH,  # [N]
    gamma,
    blocks,
    id_stride,
    capacity,
    COMMIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    n = tl.program_id(0)
    r = tl.arange(0, BLOCK_R)
    b = tl.arange(0, BLOCK_B)
    at = (n * (gamma + 1) + r)[:, None] * blocks + b[None, :]
    inside = (r <= gamma)[:, None] & (b < blocks)[None, :]
    top = tl.load(TOP + at, mask=inside, other=float("-inf"))
    row_top = tl.max(top, 1)
    best = tl.min(tl.where(inside & (top == row_top[:, None]), tl.load(BEST + at, mask=inside, other=NONE), NONE), 1)
    finite = tl.min((top == top).to(tl.int32), 1) * (tl.abs(row_top) < float("inf")).to(tl.int32)
    broken = tl.min(tl.where(r <= gamma, finite, 1), 0) == 0
    draft = tl.load(DRAFT + n * gamma + r, mask=r < gamma, other=-1)
    accepted = tl.min(tl.where((r < gamma) & (draft != best), r, gamma), 0)
    accepted = tl.where(broken, -1, accepted)
    # an accepted draft is the target's best token, so one vector holds all there is to emit
    _commit(best.to(tl.int64), accepted, r, gamma, n, TOKENS, ACCEPTED, IDS, LENGTH, id_stride, capacity, COMMIT)


@triton.jit
def _first_rejection(DRAFT, UNIFORM, P, Q, n, r, gamma, p_stride_n, p_stride_r, q_stride_n, q_stride_r):
    """(tokens [R], index of the first rejected draft or γ, whether a probability is not a number)."""
    drawn = r < gamma
    draft = tl.load(DRAFT + n * gamma + r, mask=drawn, other=0)
    p = tl.load(P + n.to(tl.int64) * p_stride_n + r * p_stride_r + draft, mask=drawn, other=1.0).to(tl.float32)
    q = tl.load(Q + n.to(tl.int64) * q_stride_n + r * q_stride_r + draft, mask=drawn, other=1.0).to(tl.float32)
    u = tl.load(UNIFORM + n * (gamma + 1) + r, mask=drawn, other=0.0)
    first = tl.min(tl.where(drawn & (u * q >= p), r, gamma), 0)
    broken = tl.max(((p != p) | (q != q)).to(tl.int32), 0)
    return draft, first, broken


@triton.jit
def _residual(P, Q, n, first, gamma, token, vocab, p_stride_n, p_stride_r, q_stride_n, q_stride_r):
    """(max(0, p - q), p) of row `first` at `token`; after γ acceptances there is no q and both are p."""
    p_row = P + n.to(tl.int64) * p_stride_n + first * p_stride_r
    q_row = Q + n.to(tl.int64) * q_stride_n + first * q_stride_r
    p = tl.load(p_row + token, mask=token < vocab, other=0.0).to(tl.float32)
    q = tl.load(q_row + token, mask=token < tl.where(first < gamma, vocab, 0), other=0.0).to(tl.float32)
    gap = p - q
    return tl.where(gap < 0.0, 0.0, gap), p  # written so that a NaN stays one


@triton.jit
def residual_blocks_kernel(
    DRAFT,  # [N, γ]
    UNIFORM,  # [N, γ+1]
    P,  # [N, γ+1, V]
    Q,  # [N, γ, V]
    MASS,  # [2, N, blocks] fp32: residual mass and p mass of each block
    gamma,
    vocab,
    p_stride_n,
    p_stride_r,
    q_stride_n,
    q_stride_r,
    BLOCK_R: tl.constexpr,
):
    n = tl.program_id(0)
    block = tl.program_id(1)
    r = tl.arange(0, BLOCK_R)
    _, first, _ = _first_rejection(DRAFT, UNIFORM, P, Q, n, r, gamma, p_stride_n, p_stride_r, q_stride_n, q_stride_r)
    token = block * BLOCK_V + tl.arange(0, BLOCK_V)
    gap, p = _residual(P, Q, n, first, gamma, token, vocab, p_stride_n, p_stride_r, q_stride_n, q_stride_r)
    out = n * tl.num_programs(1) + block
    tl.store(MASS + out, tl.sum(gap, 0))
    tl.store(MASS + tl.num_programs(0) * tl.num_programs(1) + out, tl.sum(p, 0))


@triton.jit
def _inverse_cdf(weights, goal, lane):
    """First lane whose cumulative weight exceeds `goal`; where rounding leaves none, the last lane with weight."""
    passed = (tl.cumsum(weights, 0) > goal) & (weights > 0.0)
    lane_found = tl.min(tl.where(passed, lane, NONE), 0)
    last = tl.max(tl.where(weights > 0.0, lane, 0), 0)
    return tl.where(lane_found == NONE, last, lane_found)


@triton.jit
def residual_commit_kernel(
    DRAFT,  # [N, γ]
    UNIFORM,  # [N, γ+1]
    P,  # [N, γ+1, V]
    Q,  # [N, γ, V]
    MASS,  # [2, N, blocks]
    TOKENS,  # [N, γ+1]
    ACCEPTED,  # [N]
    IDS,  # [N, capacity]
    LENGTH,  # [N]
    gamma,
    vocab,
    blocks,
    p_stride_n,
    p_stride_r,
    q_stride_n,
    q_stride_r,
    id_stride,
    capacity,
    COMMIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    n = tl.program_id(0)
    r = tl.arange(0, BLOCK_R)
    draft, first, broken = _first_rejection(
        DRAFT, UNIFORM, P, Q, n, r, gamma, p_stride_n, p_stride_r, q_stride_n, q_stride_r
    )
    b = tl.arange(0, BLOCK_B)
    gap_mass = tl.load(MASS + n * blocks + b, mask=b < blocks, other=0.0)
    p_mass = tl.load(MASS + (tl.num_programs(0) + n) * blocks + b, mask=b < blocks, other=0.0)
    # p = q up to rounding leaves no residual; then a rejection itself was rounding, and p is the limit
    no_gap = tl.sum(gap_mass, 0) <= 0.0
    mass = tl.where(no_gap, p_mass, gap_mass)
    total = tl.sum(mass, 0)
    goal = tl.load(UNIFORM + n * (gamma + 1) + gamma) * total
    block = _inverse_cdf(mass, goal, b)
    before = tl.sum(tl.where(b < block, mass, 0.0), 0)
    lane = tl.arange(0, BLOCK_V)
    token = block * BLOCK_V + lane
    gap, p = _residual(P, Q, n, first, gamma, token, vocab, p_stride_n, p_stride_r, q_stride_n, q_stride_r)
    drawn = block * BLOCK_V + _inverse_cdf(tl.where(no_gap, p, gap), goal - before, lane)
    healthy = (broken == 0) & (total > 0.0) & (total < float("inf"))
    accepted = tl.where(healthy, first, -1)
    tokens = tl.where(r == first, drawn.to(tl.int64), draft)
    _commit(tokens, accepted, r, gamma, n, TOKENS, ACCEPTED, IDS, LENGTH, id_stride, capacity, COMMIT)


def _outputs(draft: Tensor, ids: Tensor | None, length: Tensor | None) -> tuple[Accepted, tuple, dict]:
    """Empty verdict, the arguments of `_commit` that follow it, and the constants of a committing kernel."""
    n, gamma = draft.shape
    assert draft.is_contiguous() and (ids is None) == (length is None)
    out = Accepted(
        torch.empty(n, gamma + 1, dtype=torch.int64, device=draft.device),
        torch.empty(n, dtype=torch.int32, device=draft.device),
    )
    where = (out.tokens, out.accepted) if ids is None else (ids, length)
    return out, where, {"COMMIT": ids is not None, **row_constants(gamma)}


def row_constants(gamma: int) -> dict:
    return {"BLOCK_R": triton.next_power_of_2(gamma + 1)}


def block_constants(vocab: int) -> dict:
    return {"BLOCK_B": triton.next_power_of_2(triton.cdiv(vocab, BLOCK_V.value))}


def accept_greedy(draft: Tensor, logits: Tensor, ids: Tensor | None = None, length: Tensor | None = None) -> Accepted:
    """Accept drafts [N, γ] while they are the target's argmax; logits [N, γ+1, V] of the drafts' places and one more.

    With ids [N, capacity] and length [N], both int64, the tokens are appended there; what passes the capacity is
    dropped. accepted is -1 where a row's logits are not finite at their top.
    """
    n, gamma = draft.shape
    vocab = logits.shape[-1]
    assert logits.is_contiguous()
    blocks = triton.cdiv(vocab, BLOCK_V.value)
    rows = n * (gamma + 1)
    top = torch.empty(rows, blocks, dtype=torch.float32, device=logits.device)
    best = torch.empty(rows, blocks, dtype=torch.int32, device=logits.device)
    greedy_blocks_kernel[(rows, blocks)](logits, top, best, vocab, vocab)
    out, (ids, length), constants = _outputs(draft, ids, length)
    greedy_commit_kernel[(n,)](
        top, best, draft, *out, ids, length, gamma, blocks, ids.stride(0), ids.shape[-1],
        **constants, **block_constants(vocab), **GREEDY_WARPS,
    )  # fmt: skip
    return out


def accept_sampled(
    draft: Tensor,
    q: Tensor,
    p: Tensor,
    uniform: Tensor,
    ids: Tensor | None = None,
    length: Tensor | None = None,
) -> Accepted:
    """Speculative sampling of drafts [N, γ] drawn from q [N, γ, V] against p [N, γ+1, V], as the engine samples.

    uniform [N, γ+1] in [0, 1): one for each ratio test and the last for the drawn token. Rest as `accept_greedy`;
    accepted is -1 where a probability in use is not a number.
    """
    n, gamma = draft.shape
    vocab = p.shape[-1]
    assert p.stride(-1) == 1 and uniform.is_contiguous() and uniform.shape == (n, gamma + 1)
    q = q if gamma else p  # never read, but a pointer and strides must exist
    assert q.stride(-1) == 1
    blocks = triton.cdiv(vocab, BLOCK_V.value)
    mass = torch.empty(2, n, blocks, dtype=torch.float32, device=p.device)
    strides = (*p.stride()[:2], *q.stride()[:2])
    out, (ids, length), constants = _outputs(draft, ids, length)
    residual_blocks_kernel[(n, blocks)](draft, uniform, p, q, mass, gamma, vocab, *strides, **row_constants(gamma))
    residual_commit_kernel[(n,)](
        draft, uniform, p, q, mass, *out, ids, length, gamma, vocab, blocks, *strides, ids.stride(0), ids.shape[-1],
        **constants, **block_constants(vocab),
    )  # fmt: skip
    return out
