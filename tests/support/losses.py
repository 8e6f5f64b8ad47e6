"""Problems for losses: a drafter that half agrees with its target, and the plain loss on it."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from bdcli.train.losses import plain_loss
from bdcli.train.targets import HiddenTarget

T, V = 37, 61  # rows and vocabulary
TEMPERATURES = (0.5, 1.0, 1.7)


def problem(rows=T, vocab=V, dtype=torch.float64, seed=0, width=11, spread=0.7, views=()):
    """A drafter that half agrees with its target, and row weights of which a third are 0."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    hidden, target_head = normal(rows, width), normal(vocab, width) * spread
    x = (hidden + normal(*views, rows, width)).requires_grad_()
    head = (target_head + 0.3 * normal(vocab, width)).requires_grad_()
    weights = torch.rand(*views, rows, generator=g) * (torch.rand(*views, rows, generator=g) > 1 / 3)
    return SimpleNamespace(x=x, head=head, target=HiddenTarget(hidden, target_head), weights=weights)


def target_probs(target, temperature):
    """p [T, V] of a hidden target, one-hot at temperature 0."""
    logits = F.linear(target.hidden, target.head)
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    return (logits / temperature).softmax(-1)


def plain(kind, a, temperature):
    """(weighted mean loss, ℓ, α) by the plain formulas and autograd."""
    losses, alpha = plain_loss(kind, target_probs(a.target, temperature), F.linear(a.x, a.head), temperature or 1.0)
    weights = a.weights.to(losses.dtype)
    return (weights * losses).sum() / weights.sum(), losses, alpha


def grads(loss, a):
    """Of a problem's x and head."""
    return torch.autograd.grad(loss, (a.x, a.head), retain_graph=True)
