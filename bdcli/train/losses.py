"""Acceptance losses between a drafter's distribution q and the target's p, through the lm head, in row chunks.

One proposal is accepted with probability α = Σ_v min(p_v, q_v) = 1 - TV(p, q) (Leviathan et al. 2023). With scaled
drafter logits u = z / τ, log q = log_softmax(u), S = {v: q_v < p_v} and sg(·) a detached value, a row's loss and
its gradient with respect to u are

    ce         -log q_y, y = argmax p                     q - 1_y
    kl         Σ p (log p - log q)                        q - p
    log_alpha  -log α                                     q · r - s,  s_v = 1[v ∈ S] q_v / α,  r = Σ s
    lk         λ · KL + (1 - λ) · (1 - α)                 λ (q - p) + (1 - λ) α (q · r - s)
               λ = sg(exp(-3 α))

A tie q_v = p_v is taken as p_v, a constant: then at q = p every gradient is 0. s and r never exceed 1 and are made
from logarithms in `log_alpha`, so α may underflow and no floor is needed.

Temperature τ > 0 is the serving temperature and divides both sides' logits. τ = 0 is greedy serving: p is one-hot on
its argmax, q keeps temperature 1 so that it has a gradient; -log α and KL are then cross-entropy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bdcli.base.errors import UserError
from bdcli.train.targets import ArgmaxTarget, HiddenTarget, LogProbs, Target, wide, wide_dtype

KINDS = ("ce", "kl", "log_alpha", "lk")
LK_DECAY = 3.0  # λ = exp(-LK_DECAY · α): KL while acceptance is low, TV once it is high
LOGIT_ROWS = 256  # rows whose logits live at once


@dataclass(frozen=True)
class Stats:
    """Per row, detached, shaped like x without its last axis.

    losses: ℓ, unweighted. alpha: Σ min(p, q) of the p that was read, so q(y) where that is one-hot. hit: argmax q =
    argmax p, what greedy serving accepts. A logit that is not finite, on either side, makes losses and alpha NaN
    and is never a hit.
    """

    losses: Tensor
    alpha: Tensor
    hit: Tensor


def head_loss(
    x: Tensor,
    head: Tensor,
    target: Target,
    kind: str,
    temperature: float = 0.0,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Stats]:
    """Σ w·ℓ / denominator (a scalar, differentiable in x and head) and what it saw on the way.

    x [T, hidden_d] after the drafter's final norm, or [views, T, hidden_d] where views share the target's T rows and
    p is made once for all of them. head [V, hidden_d]; products run in x's dtype, its gradient is summed in fp32.
    weights: like x without its last axis, ones by default. denominator: Σ w by default; pass the global Σ w when
    the rows are one of several micro-batches or ranks, and summed gradients equal those of the whole.

    Gradients are made while the logits of a chunk are at hand, in the forward pass; without grad mode none are. At
    most a handful of chunk × V tensors live at a time; where `kernel_rows` has a kernel, two in x's dtype.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is not a loss; choose from {', '.join(KINDS)}")
    if isinstance(target, ArgmaxTarget) and temperature != 0 and kind != "ce":
        raise UserError(
            f"cached argmax tokens cannot teach {kind} at temperature {temperature:g}",
            "Cache topk or hidden instead, or use the loss ce.",
        )
    if weights is None:
        weights = torch.ones(x.shape[:-1], device=x.device)
    weights = weights.detach().to(wide_dtype(x))
    if denominator is None:
        denominator = weights.sum().clamp_(min=torch.finfo(weights.dtype).tiny)  # no weight at all: loss 0, not 0 / 0
    kernel, rows = kernel_rows(x, target, temperature, head.shape[0])
    call = _Call(target, kind, temperature, weights, denominator, chunk or rows, torch.is_grad_enabled(), kernel)
    loss, *stats = _HeadLoss.apply(x, head, call)
    return loss, Stats(*stats)


def kernel_rows(x: Tensor, target: Target, temperature: float, vocabulary: int) -> tuple[Callable | None, int]:
    """(`bd_kernels.head_loss.loss_rows` where it serves, rows whose logits live at once).

    It serves on CUDA, in low precision, for the exact p of a hidden target at a temperature above 0. Else the first is
    None, and torch makes rows of fp32 logits.
    """
    fits = isinstance(target, HiddenTarget) and temperature > 0 and x.dtype in (torch.bfloat16, torch.float16)
    if x.device.type != "cuda" or not fits or importlib.util.find_spec("triton") is None:
        return None, LOGIT_ROWS
    from bd_kernels.head_loss import PART_ELEMENTS, loss_rows

    return loss_rows, max(LOGIT_ROWS, PART_ELEMENTS // vocabulary)


@dataclass(frozen=True)
class _Call:
    """Arguments of `head_loss` beside x and head. learn: gradients are wanted. kernel: `loss_rows`; None is torch."""

    target: Target
    kind: str
    temperature: float
    weights: Tensor
    denominator: float | Tensor
    chunk: int
    learn: bool
    kernel: Callable | None


class _HeadLoss(torch.autograd.Function):
    """The chunk loop. Saves Σ w ∂ℓ/∂x and Σ w ∂ℓ/∂head; backward only scales (as fused linear cross-entropy does)."""

    @staticmethod
    def forward(ctx, x, head, call: _Call):
        target, kernel, kind = call.target, call.kernel, call.kind
        rows, width = x.shape[-2:]
        views, weight = x.reshape(-1, rows, width), head.to(x.dtype)
        tau = call.temperature or 1.0
        row_scale = (call.weights / tau).reshape(-1, rows, 1)
        losses, alpha = torch.empty_like(row_scale[..., 0]), torch.empty_like(row_scale[..., 0])
        hit = torch.empty_like(losses, dtype=torch.bool)
        grad_x = torch.empty_like(views) if call.learn and x.requires_grad else None
        grad_head = torch.zeros_like(head, dtype=losses.dtype) if call.learn and head.requires_grad else None
        learn = grad_x is not None or grad_head is not None
        for start in range(0, rows, call.chunk):
            span = slice(start, start + call.chunk)
            best, log_p_of = (None, None) if kernel else target.read(span, call.temperature)
            exact = F.linear(target.hidden[span], target.head) if kernel else None
            for i, view in enumerate(views):
                part = view[span]
                logits = F.linear(part, weight)
                if kernel:
                    scale = tau * row_scale[i, span, 0] if learn else None
                    losses[i, span], alpha[i, span], hit[i, span] = kernel(logits, exact, kind, tau, scale)
                    grad = logits  # which the kernel has made of it
                else:
                    logits = wide(logits)
                    hit[i, span] = logits.max(-1).indices == best
                    losses[i, span], alpha[i, span], grad = _rows(
                        kind, logits.div_(tau) if tau != 1 else logits, best, log_p_of, learn
                    )
                if not learn:
                    continue
                grad = grad if kernel else grad.mul_(row_scale[i, span]).to(x.dtype)
                if grad_x is not None:
                    torch.mm(grad, weight, out=grad_x[i, span])
                if grad_head is not None and grad.dtype == grad_head.dtype:
                    grad_head.addmm_(grad.T, part)
                elif grad_head is not None:
                    grad_head += grad.T @ part
        hit &= alpha.isfinite()
        ctx.save_for_backward(grad_x, grad_head)
        ctx.denominator, ctx.head_dtype, ctx.shape = call.denominator, head.dtype, x.shape
        loss = (call.weights.reshape(losses.shape) * losses).sum() / call.denominator
        stats = [t.view(x.shape[:-1]) for t in (losses, alpha, hit)]
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        grad_x, grad_head = ctx.saved_tensors
        scale = grad_loss / ctx.denominator
        return (
            None if grad_x is None else (grad_x * scale).to(grad_x.dtype).reshape(ctx.shape),
            None if grad_head is None else (grad_head * scale).to(ctx.head_dtype),
            None,
        )


def _rows(
    kind: str, logits: Tensor, best: Tensor, log_p_of: LogProbs | None, learn: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(ℓ [C], α [C], ∂ℓ/∂u [C, V] or None) of scaled logits u [C, V]; the table at the top of this file."""
    log_q = logits.log_softmax(-1)
    log_p = log_p_of(log_q) if log_p_of else None
    if log_p is None or kind == "ce":
        unknown, best = best < 0, best[:, None].clamp(min=0)
        losses = -log_q.gather(-1, best)[:, 0].masked_fill(unknown, torch.nan)
        alpha = losses.neg().exp() if log_p is None else torch.minimum(log_p, log_q).exp_().sum(-1)
        pull = None
        if kind == "lk":
            blend = (-LK_DECAY * alpha).exp()
            losses, pull = torch.lerp(1 - alpha, losses, blend), blend + (1 - blend) * alpha
        if not learn:
            return losses, alpha, None
        grad = log_q.exp_().scatter_add_(-1, best, torch.full_like(best, -1, dtype=log_q.dtype))
        return losses, alpha, grad if pull is None else grad.mul_(pull[:, None])

    if kind == "log_alpha":
        overlap = torch.minimum(log_p, log_q)  # minimum, not where: a NaN must not read as p
        top = overlap.amax(-1, keepdim=True)
        overlap.sub_(top).exp_()
        mass = overlap.sum(-1, keepdim=True)
        log_alpha = (top + mass.log())[:, 0]
        if not learn:
            return -log_alpha, log_alpha.exp(), None
        below = overlap.masked_fill_(log_q >= log_p, 0).div_(mass)  # s: where q < p the overlap is q
        return -log_alpha, log_alpha.exp(), log_q.exp_().mul_(below.sum(-1, keepdim=True)).sub_(below)

    p = log_p.exp()
    losses = torch.sub(log_p, log_q).mul_(p).sum(-1)
    q = log_q.exp_()
    alpha = torch.minimum(p, q).sum(-1)
    if kind == "kl":
        return losses, alpha, q.sub_(p) if learn else None
    blend = (-LK_DECAY * alpha).exp()
    losses = torch.lerp(1 - alpha, losses, blend)
    if not learn:
        return losses, alpha, None
    below = torch.where(q < p, q, 0)  # α · s
    blend, outside = blend[:, None], below.sum(-1, keepdim=True)
    # λ (q - p) + (1 - λ) (q · αr - αs), gathered by q, p and αs
    grad = q.mul_(torch.lerp(outside, torch.ones_like(outside), blend))
    return losses, alpha, grad.sub_(p.mul_(blend)).sub_(below.mul_(1 - blend))


def accepted_length_weights(alpha: Tensor, gamma: int, first: Tensor | None = None) -> Tensor:
    """Row weights [..., T] that turn -log α into the expected accepted length, from acceptances α [..., T].

    Every position s begins a block of γ, cut short where its text ends, with expected accepted length
    L_s = Σ_{k=1..γ} Π_{i<k} α_{s+i}. The weight of t is ∂/∂log α_t of Σ_s L_s / γ: the mean, over the γ places j
    that t takes in a block, of w_j = Σ_{k≥j} Π_{i≤k} α_i; γ/2 + 1/2 where all α are 1, 0 where they are 0. The last
    axis is one text, or several: `first`, boolean and shaped like α, marks where each begins, and no block crosses it.
    α must be known before the loss: take it from `head_loss` under `torch.no_grad`.
    """
    length = alpha.shape[-1]
    blocks = F.pad(alpha.detach(), (0, gamma - 1)).unfold(-1, gamma, 1)  # [..., T, γ]; a 0 ends a block
    if first is not None:
        text = F.pad(first.long().cumsum(-1), (0, gamma - 1)).unfold(-1, gamma, 1)
        blocks = blocks.masked_fill(text != text[..., :1], 0)
    share = blocks.cumprod(-1).flip(-1).cumsum(-1).flip(-1) / gamma
    weights = torch.zeros_like(alpha)
    for place in range(min(gamma, length)):
        weights[..., place:] += share[..., : length - place, place]
    return weights


def plain_loss(kind: str, p: Tensor, logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The plain form: (ℓ [T], α [T]) of serving probabilities p [T, V] and drafter logits [T, V], left to autograd."""
    log_q = (logits / temperature).log_softmax(-1)
    q = log_q.exp()
    alpha = torch.where(q < p, q, p).sum(-1)
    kl = (torch.xlogy(p, p) - p * log_q).sum(-1)
    blend = (-LK_DECAY * alpha.detach()).exp()
    losses = {
        "ce": -log_q.gather(-1, p.argmax(-1, keepdim=True))[:, 0],
        "kl": kl,
        "log_alpha": -alpha.log(),
        "lk": blend * kl + (1 - blend) * (1 - alpha),
    }
    return losses[kind], alpha
