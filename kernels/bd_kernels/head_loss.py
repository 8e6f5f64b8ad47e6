"""LM head and acceptance loss in one: hidden rows in, a loss per row out, and never more logits than one part of rows.

The head's products are GEMMs and stay with cuBLAS; the kernels read a part's logits where they lie, and the backward
pass, which makes them anew from hidden rows and saved row sums, turns them into their own gradient in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

PART_ELEMENTS = 2**25  # logits that live at once: 64 MiB in bf16, enough rows for a full-speed GEMM
FLOOR = tl.constexpr(1e-30)  # of α inside the logarithm
LK_DECAY = tl.constexpr(3.0)
NONE = tl.constexpr(2**31 - 1)


@triton.jit
def _log_sum(x, peak, total):
    """One step of a lane-wise log-sum-exp: x, peak and total [V block]."""
    new_peak = tl.maximum(peak, x)
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    return new_peak, total * tl.exp(peak - base) + tl.exp(x - base)


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
    ALPHA,  # [rows] Σ min(p, q); for "ce" whether the argmaxes agree
    SUMS,  # [rows, 3] fp32: log-sum-exp of z/τ and of y/τ, and Σ q where q < p
    BEST,  # [rows] argmax of y (KIND == "ce")
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
        if KIND == "ce":
            z_best = tl.where(z > z_peak, token, z_best)
            y_best = tl.where(y > y_peak, token, y_best)
        z_peak, z_total = _log_sum(z, z_peak, z_total)
        y_peak, y_total = _log_sum(y, y_peak, y_total)
    z_lse = _finish(z_peak, z_total)
    y_lse = _finish(y_peak, y_total)
    below = 0.0
    if KIND == "ce":
        # the first of equals, like torch.argmax
        best = tl.min(tl.where(y_peak == tl.max(y_peak, 0), y_best, NONE), 0)
        guess = tl.min(tl.where(z_peak == tl.max(z_peak, 0), z_best, NONE), 0)
        alpha = (guess == best).to(tl.float32)
        loss = z_lse - tl.load(z_row + best).to(tl.float32) * inverse_temperature
        tl.store(BEST + row, best)
    else:
        shared = tl.zeros([BLOCK_V], tl.float32)
        less = tl.zeros([BLOCK_V], tl.float32)
        gap = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, vocab, BLOCK_V):
            token = start + lane
            z = tl.load(z_row + token, mask=token < vocab, other=float("-inf")).to(tl.float32) * inverse_temperature
            y = tl.load(y_row + token, mask=token < vocab, other=float("-inf")).to(tl.float32) * inverse_temperature
            log_q = z - z_lse
            log_p = y - y_lse
            q = tl.exp(log_q)
            p = tl.exp(log_p)
            shared += tl.where(q < p, q, p)
            less += tl.where(q < p, q, 0.0)
            gap += tl.where(p > 0.0, p * (log_p - log_q), 0.0)
        alpha = tl.sum(shared, 0)
        below = tl.sum(less, 0)
        kl = tl.sum(gap, 0)
        if KIND == "kl":
            loss = kl
        elif KIND == "alpha":
            loss = -tl.log(tl.maximum(alpha, FLOOR))
        else:
            mix = tl.exp(-(alpha * LK_DECAY))
            loss = mix * kl + (1.0 - mix) * (1.0 - alpha)
    tl.store(LOSS + row, loss)
    tl.store(ALPHA + row, alpha)
    tl.store(SUMS + 3 * row, z_lse)
    tl.store(SUMS + 3 * row + 1, y_lse)
    tl.store(SUMS + 3 * row + 2, below)


@triton.jit
def gradient_kernel(
    Z,  # [rows, V] drafter's logits, overwritten with the gradient
    Y,  # [rows, V]
    GRAD,  # [rows] gradient of each row's loss
    ALPHA,  # as `loss_kernel` left them
    SUMS,
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
    q = tl.exp(z - tl.load(SUMS + 3 * row))
    if KIND == "ce":
        slope = q - (token == tl.load(BEST + row)).to(tl.float32)
    else:
        y = tl.load(Y + row * y_stride + token, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
        p = tl.exp(y - tl.load(SUMS + 3 * row + 1))
        alpha = tl.load(ALPHA + row)
        towards_alpha = q * ((q < p).to(tl.float32) - tl.load(SUMS + 3 * row + 2))  # dα/dz
        if KIND == "kl":
            slope = q - p
        elif KIND == "alpha":
            slope = -towards_alpha / tl.maximum(alpha, FLOOR)
        else:
            mix = tl.exp(-(alpha * LK_DECAY))
            slope = mix * (q - p) - (1.0 - mix) * towards_alpha
    slope *= tl.load(GRAD + row) * inverse_temperature
    tl.store(z_at, slope.to(Z.dtype.element_ty), mask=inside)


def loss_constants(kind: str) -> tuple[dict, dict]:
    """Compile-time constants and launch options of both kernels."""
    return {"KIND": kind, "BLOCK_V": 2048}, {"num_warps": 8}


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, kind, temperature, target_logits, target_hidden, target_head):
        ctx.kind, ctx.temperature = kind, temperature
        rows, vocab = hidden.shape[0], head.shape[0]
        loss, alpha = (torch.empty(rows, dtype=torch.float32, device=hidden.device) for _ in range(2))
        sums = torch.empty(rows, 3, dtype=torch.float32, device=hidden.device)
        best = torch.empty(rows, dtype=torch.int32, device=hidden.device)
        constants, options = loss_constants(kind)
        for part in _parts(rows, vocab):
            z, y = F.linear(hidden[part], head), _target(part, target_logits, target_hidden, target_head)
            loss_kernel[(z.shape[0],)](
                z, y, loss[part], alpha[part], sums[part], best[part],
                vocab, z.stride(0), y.stride(0), 1.0 / temperature, **constants, **options,
            )  # fmt: skip
        ctx.save_for_backward(hidden, head, target_logits, target_hidden, target_head, alpha, sums, best)
        ctx.mark_non_differentiable(alpha)
        return loss, alpha

    @staticmethod
    def backward(ctx, grad, _):
        hidden, head, target_logits, target_hidden, target_head, alpha, sums, best = ctx.saved_tensors
        for_hidden, for_head = ctx.needs_input_grad[:2]
        rows, vocab = hidden.shape[0], head.shape[0]
        grad = grad.contiguous()
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if for_head else None  # many parts add up in fp32
        constants, options = loss_constants(ctx.kind)
        for part in _parts(rows, vocab):
            z = F.linear(hidden[part], head)
            # cross-entropy needs the target's argmax only, which is saved
            y = z if ctx.kind == "ce" else _target(part, target_logits, target_hidden, target_head)
            gradient_kernel[(z.shape[0], triton.cdiv(vocab, constants["BLOCK_V"]))](
                z, y, grad[part], alpha[part], sums[part], best[part],
                vocab, z.stride(0), y.stride(0), 1.0 / ctx.temperature, **constants, **options,
            )  # fmt: skip
            if for_hidden:
                torch.mm(z, head, out=grad_hidden[part])
            if for_head:
                grad_head += z.T @ hidden[part]
        return grad_hidden, None if grad_head is None else grad_head.to(head.dtype), None, None, None, None, None


def _parts(rows: int, vocab: int) -> list[slice]:
    step = max(1, PART_ELEMENTS // vocab)
    return [slice(a, min(a + step, rows)) for a in range(0, rows, step)]


def _target(part: slice, logits: Tensor | None, hidden: Tensor | None, head: Tensor | None) -> Tensor:
    return logits[part] if logits is not None else F.linear(hidden[part], head)


def head_loss(
    hidden: Tensor,
    head: Tensor,
    kind: str,
    *,
    target_logits: Tensor | None = None,
    target_hidden: Tensor | None = None,
    target_head: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(losses, α), each fp32 [T], of drafter rows hidden [T, E] with head [V, E] against the target.

    The target comes as logits [T, V] or as hidden rows [T, E'] with its head [V, E']; it gets no gradient. kind is
    "ce" (cross-entropy on the target's argmax; α is whether the drafter's agrees), "kl" (forward KL), "alpha"
    (-log α, α = Σ min(p, q)) or "lk" (exp(-3·sg(α))·KL + (1 - exp(-3·sg(α)))·TV). Weigh rows outside, if need be by
    what α says: `(weights * losses).sum()`. hidden and head share a dtype; call it outside autocast.
    """
    assert kind in ("ce", "kl", "alpha", "lk"), kind
    assert (target_logits is None) != (target_hidden is None), "the target comes as logits or as hidden rows"
    assert target_logits is None or target_logits.stride(-1) == 1
    return _HeadLoss.apply(hidden, head, kind, temperature, target_logits, target_hidden, target_head)
