"""Muon for the matrices inside layers, AdamW for everything else, and the shapes of a learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bdcli.config.optimizer import Updates
from bdcli.model.llama import Model

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic whose fixed band is singular values of 0.7 to 1.2
_ROUNDS = 5


def make_optimizers(model: Model, settings: Updates) -> list[torch.optim.Optimizer]:
    """Optimizers over every trainable tensor of `model`; each group's `peak` is its peak learning rate."""
    c = model.config
    muon: list[tuple[Tensor, tuple[int, ...]]] = []
    if settings.method == "muon":
        rows = (c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim)
        for layer in model.layers:
            half = layer.gate_up.shape[0] // 2
            muon += [(layer.qkv, rows), (layer.out, (layer.out.shape[0],))]
            muon += [(layer.gate_up, (half, half)), (layer.down, (layer.down.shape[0],))]
    taken = {id(t) for t, _ in muon}
    rest = [t for t in model.tensors() if t.requires_grad and id(t) not in taken]
    rate = settings.lr if settings.vector_lr is None or not muon else settings.vector_lr
    groups = [
        {"params": [t for t in rest if t.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [t for t in rest if t.dim() == 1], "weight_decay": 0.0},
    ]
    betas = (0.9, 0.95) if muon else (0.9, 0.999)
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=rate, betas=betas)]
    if muon:
        made.append(Muon(muon, settings.lr, settings.weight_decay))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return made


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are replaced by the nearest orthogonal ones (Jordan et al. 2024).

    Each parameter comes with the rows of the matrices stacked in it (q, k, v; gate, up), which are orthogonalised
    apart, all of one shape in one batch. Updates are scaled by 0.2 √max(m, n) (Liu et al. 2025), so that learning
    rates and weight decay of AdamW fit.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, tuple[int, ...]]], lr: float, weight_decay: float):
        super().__init__([t for t, _ in parts], {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        self._rows = [rows for _, rows in parts]

    @torch.no_grad()
    def step(self) -> None:
        """One update; parameters without a gradient are left alone."""
        (group,) = self.param_groups
        wanted: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for t, rows in zip(group["params"], self._rows, strict=True):
            if t.grad is None:
                continue
            momentum = self.state[t].setdefault("momentum", torch.zeros_like(t))
            momentum.lerp_(t.grad, 1 - group["momentum"])
            ahead = t.grad.lerp(momentum, group["momentum"])  # Nesterov
            t.mul_(1 - group["lr"] * group["weight_decay"])
            for part, update in zip(t.split(rows), ahead.split(rows), strict=True):
                tall = update.shape[0] > update.shape[1]
                part, update = (part.T, update.T) if tall else (part, update)
                wanted.setdefault(tuple(part.shape), []).append((part, update))
        for shape, pairs in wanted.items():
            step = orthogonal(torch.stack([update for _, update in pairs]))
            scale = -group["lr"] * 0.2 * math.sqrt(max(shape))
            for (part, _), update in zip(pairs, step, strict=True):
                part.add_(update, alpha=scale)


def orthogonal(x: Tensor) -> Tensor:
    """About U Vᵀ of each matrix U S Vᵀ in x [N, m, n], m ≤ n, fp32; singular values land in 0.7 .. 1.2."""
    a, b, c = _NEWTON_SCHULZ
    narrow = x.device.type == "cuda" or getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    y = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(torch.bfloat16 if narrow else torch.float32)
    for _ in range(_ROUNDS):
        gram = y @ y.mT
        y = a * y + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ y
    return y.float()


def warm_cosine(step: int, warmup: int, steps: int) -> float:
    """Share of the peak at `step` (from 0): linear warm-up, then a cosine that ends at zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def trapezoid(share: float, warmup: float, decay: float) -> float:
    """Share of the peak when `share` of a run is done: linear up over `warmup`, flat, linear to zero over `decay`."""
    return max(0.0, min(1.0, share / warmup if warmup else 1.0, (1 - share) / decay if decay else 1.0))
