"""Acceptance losses of rows of logits, which become their own gradient in place, so that no second N × V tensor lives.

The products with the lm heads are GEMMs and stay with cuBLAS; `bdcli.train.losses` makes them part by part of the rows
and has the table of losses and gradients that both sides here follow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PART_ELEMENTS = 2**25  # logits that live at once: 64 MiB in bf16, enough rows for a full-speed GEMM
LK_DECAY = tl.constexpr(3.0)
NONE = tl.constexpr(2**31 - 1)
KINDS = ("ce", "kl", "log_alpha", "lk")


@triton.jit
def _log_sum(x, peak, total):
    """One step of a lane-wise log-sum-exp: x, peak and total [V block]; also what shrinks sums made before."""
    new_peak = tl.maximum(peak, x)
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    shrink = tl.exp(peak - base)
    return new_peak, total * shrink + tl.exp(x - base), shrink, base


@triton.jit
def _finish(peak, total):
    """Log-sum-exp over the lanes."""
    top = tl.max(peak, 0)
    return top + tl.log(tl.sum(total * tl.exp(peak - top), 0))


@triton.jit
def loss_kernel(
    Z,  # [rows, V] drafter's logits
    Y,  # [rows, V] target's logits
    LOSS,  # [rows]
    ALPHA,  # [rows] Σ min(p, q)
    HIT,  # [rows] int8: the argmaxes agree, and everything is finite
    SUMS,  # [rows, 4] fp32: log-sum-exp of z/τ and of y/τ; α or log α; Σ q where q < p, over α for log_alpha
    BEST,  # [rows] argmax of y
    vocab,
    z_stride,
    y_stride,
    inverse_temperature,
    KIND: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = Z + row * z_stride
    y_row = Y + row * y_stride
    lane = tl.arange(0, BLOCK_V)
    z_peak = tl.full([BLOCK_V], float("-inf"), tl.float32)
    y_peak = tl.full([BLOCK_V], float("-inf"), tl.float32)
    z_total = tl.zeros([BLOCK_V], tl.float32)
    y_total = tl.zeros([BLOCK_V], tl.float32)
    z_best = tl.zeros([BLOCK_V], tl.int32)
    y_best = tl.zeros([BLOCK_V], tl.int32)
    for start in range(0, vocab, BLOCK_V):
        token = start + lane
        z = tl.load(z_row + token, mask=token < vocab, other=float("-inf")).to(tl.float32) * inverse_temperature
        y = tl.load(y_row + token, mask=token < vocab, other=float("-inf")).to(tl.float32) * inverse_temperature
        z_best = tl.where(z > z_peak, token, z_best)
        y_best = tl.where(y > y_peak, token, y_best)
        z_peak, z_total, _, _ = _log_sum(z, z_peak, z_total)
        y_peak, y_total, _, _ = _log_sum(y, y_peak, y_total)
    z_lse = _finish(z_peak, z_total)
    y_lse = _finish(y_peak, y_total)
    # the first of equals, like torch.argmax
    best = tl.min(tl.where(y_peak == tl.max(y_peak, 0), y_best, NONE), 0)
    guess = tl.min(tl.where(z_peak == tl.max(z_peak, 0), z_best, NONE), 0)
    best = tl.minimum(best, vocab - 1)  # a NaN equals nothing

    peak = tl.full([BLOCK_V], float("-inf"), tl.float32)
    shared = tl.zeros([BLOCK_V], tl.float32)
    less = tl.zeros([BLOCK_V], tl.float32)
    gap = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, vocab, BLOCK_V):
        token = start + lane
        z = tl.load(z_row + token, mask=token < vocab, other=float("-inf")).to(tl.float32) * inverse_temperature
        y = tl.load(y_row + token, mask=token < vocab, other=float("-inf")).to(tl.float32) * inverse_temperature
        log_q = z - z_lse
        log_p = y - y_lse
        if KIND == "log_alpha":
            overlap = tl.minimum(log_q, log_p)
            peak, shared, shrink, base = _log_sum(overlap, peak, shared)
            less = less * shrink + tl.where(log_q < log_p, tl.exp(log_q - base), 0.0)
        else:
            q = tl.exp(log_q)
            p = tl.exp(log_p)
            shared += tl.where(q < p, q, p)
            less += tl.where(q < p, q, 0.0)
            gap += tl.where(p > 0.0, p * (log_p - log_q), 0.0)
    if KIND == "log_alpha":
        top = tl.max(peak, 0)
        total = tl.sum(shared * tl.exp(peak - top), 0)
        below = tl.sum(less * tl.exp(peak - top), 0) / total
        kept = top + tl.log(total)
        alpha = tl.exp(kept)
        loss = -kept
    else:
        alpha = tl.sum(shared, 0)
        below = tl.sum(less, 0)
        kept = alpha
        kl = tl.sum(gap, 0)
        loss = kl
        if KIND == "ce":
            loss = z_lse - tl.load(z_row + best).to(tl.float32) * inverse_temperature
        elif KIND == "lk":
            mix = tl.exp(-(alpha * LK_DECAY))
            loss = mix * kl + (1.0 - mix) * (1.0 - alpha)
    # a logit that is not finite, on either side, makes its row's sums so, and must never read as acceptance
    sound = (tl.abs(z_lse) < float("inf")) & (tl.abs(y_lse) < float("inf"))
    tl.store(LOSS + row, tl.where(sound, loss, float("nan")))
    tl.store(ALPHA + row, tl.where(sound, alpha, float("nan")))
    tl.store(HIT + row, ((guess == best) & sound).to(tl.int8))
    tl.store(SUMS + 4 * row, z_lse)
    tl.store(SUMS + 4 * row + 1, y_lse)
    tl.store(SUMS + 4 * row + 2, kept)
    tl.store(SUMS + 4 * row + 3, below)
    tl.store(BEST + row, best)


@triton.jit
def gradient_kernel(
    Z,  # [rows, V] drafter's logits, overwritten with the gradient
    Y,  # [rows, V]
    SCALE,  # [rows] factor of each row's gradient
    SUMS,  # as `loss_kernel` left them
    BEST,
    vocab,
    z_stride,
    y_stride,
    inverse_temperature,
    KIND: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = token < vocab
    z_at = Z + row * z_stride + token
    z = tl.load(z_at, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
    log_q = z - tl.load(SUMS + 4 * row)
    q = tl.exp(log_q)
    if KIND == "ce":
        slope = q - (token == tl.load(BEST + row)).to(tl.float32)
    else:
        y = tl.load(Y + row * y_stride + token, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
        log_p = y - tl.load(SUMS + 4 * row + 1)
        kept = tl.load(SUMS + 4 * row + 2)
        below = tl.load(SUMS + 4 * row + 3)
        if KIND == "log_alpha":
            slope = q * below - tl.where(log_q < log_p, tl.exp(log_q - kept), 0.0)
        else:
            p = tl.exp(log_p)
            slope = q - p
            if KIND == "lk":
                mix = tl.exp(-(kept * LK_DECAY))
                slope = mix * slope + (1.0 - mix) * q * (below - (q < p).to(tl.float32))
    slope *= tl.load(SCALE + row) * inverse_temperature
    tl.store(z_at, slope.to(Z.dtype.element_ty), mask=inside)


def loss_constants(kind: str) -> tuple[dict, dict]:
    """Compile-time constants and launch options of both kernels."""
    return {"KIND": kind, "BLOCK_V": 2048}, {"num_warps": 8}


def loss_rows(
    z: Tensor, y: Tensor, kind: str, temperature: float = 1.0, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses fp32, α fp32, hits bool), each [T], of drafter logits z [T, V] against target logits y [T, V].

    With scale [T] fp32, z becomes scale · ∂ℓ/∂z. kind is one of KINDS, temperature > 0 divides both sides. A row with
    a logit that is not finite has NaN losses and α and is no hit; -inf, no mass, is fine.
    """
    assert kind in KINDS and z.stride(-1) == y.stride(-1) == 1 and z.shape == y.shape
    rows, vocab = z.shape
    losses, alpha = (torch.empty(rows, dtype=torch.float32, device=z.device) for _ in range(2))
    hit = torch.empty(rows, dtype=torch.int8, device=z.device)
    sums = torch.empty(rows, 4, dtype=torch.float32, device=z.device)
    best = torch.empty(rows, dtype=torch.int32, device=z.device)
    constants, options = loss_constants(kind)
    strides = vocab, z.stride(0), y.stride(0), 1.0 / temperature
    loss_kernel[(rows,)](z, y, losses, alpha, hit, sums, best, *strides, **constants, **options)
    if scale is not None:
        blocks = triton.cdiv(vocab, constants["BLOCK_V"])
        gradient_kernel[(rows, blocks)](z, y, scale.contiguous(), sums, best, *strides, **constants, **options)
    return losses, alpha, hit.bool()
