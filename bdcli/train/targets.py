"""What a loss knows of the target: its exact distributions p, the top of them, or its choices.

Truncated and one-hot targets are made at a serving temperature and stored; see `bdcli.train.losses` for the losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bdcli.base.errors import UserError

NOTHING = -1e4  # log of no mass: its exp is 0 even in fp64, and 0 · NOTHING is 0 where 0 · -inf would be NaN

LogProbs = Callable[[Tensor], Tensor]  # log q [C, V] -> log p [C, V]; only a truncated target looks at q


class Target(Protocol):
    """The target's side of T rows."""

    def read(self, span: slice, temperature: float) -> tuple[Tensor, LogProbs | None]:
        """argmax p [C] of a slice of the rows, -1 where it is not finite; p, or None where it is taken as one-hot."""

    def cut(self, span: slice) -> Target:
        """The same for a slice of the rows."""

    def within(self, vocabulary: int) -> tuple[Target, Tensor | None]:
        """The same for a drafter that has only the first `vocabulary` ids, with p over those alone.

        Beside it the rows [T] of which nothing is left, as a boolean; None where that cannot be.
        """


@dataclass(frozen=True)
class HiddenTarget:
    """Exact p of hidden states [T, hidden_t], after the target's final norm, and its lm head [V, hidden_t]."""

    hidden: Tensor
    head: Tensor

    def cut(self, span: slice) -> HiddenTarget:
        return replace(self, hidden=self.hidden[span])

    def within(self, vocabulary: int) -> tuple[HiddenTarget, None]:
        return self if vocabulary >= len(self.head) else replace(self, head=self.head[:vocabulary]), None

    def read(self, span: slice, temperature: float) -> tuple[Tensor, LogProbs | None]:
        logits = wide(F.linear(self.hidden[span], self.head))
        top, best = logits.max(-1)
        best.masked_fill_(~top.isfinite(), -1)
        if temperature == 0:
            return best, None
        log_p = (logits.div_(temperature) if temperature != 1 else logits).log_softmax(-1)
        return best, lambda _log_q: log_p


@dataclass(frozen=True)
class TopKTarget:
    """Cached top-k: token indices and log-probabilities [T, k], falling, made at the serving `temperature`.

    The rest of the mass, 1 - Σ_k p, is spread over the other tokens as q spreads its own there (detached). So the
    tail acts as one bucket: it teaches how much mass lies outside the k tokens and never how it is shaped, and α is
    at most min(tail of p, tail of q) above its exact value.
    """

    index: Tensor
    log_probs: Tensor
    temperature: float
    vocabulary: int | None = None  # where the index is this, the drafter has no such token

    def cut(self, span: slice) -> TopKTarget:
        return replace(self, index=self.index[span], log_probs=self.log_probs[span])

    def within(self, vocabulary: int) -> tuple[TopKTarget, Tensor | None]:
        unknown = self.index >= vocabulary
        if not unknown.any():
            return self, None
        order = unknown.int().argsort(dim=-1, stable=True)  # known ones first, falling as before
        unknown, index = unknown.gather(-1, order), self.index.gather(-1, order)
        logs = self.log_probs.gather(-1, order).float()
        lost = logs.masked_fill(~unknown, -torch.inf).logsumexp(-1, keepdim=True).exp().clamp(max=1 - 1e-6)
        logs = (logs - torch.log1p(-lost)).masked_fill(unknown, NOTHING)
        index = index.masked_fill(unknown, vocabulary)
        return TopKTarget(index, logs, self.temperature, vocabulary), unknown[..., 0]

    def read(self, span: slice, temperature: float) -> tuple[Tensor, LogProbs | None]:
        index = self.index[span].long()
        best = index[:, 0] if self.vocabulary is None else index[:, 0].clamp(max=self.vocabulary - 1)
        if temperature == 0:
            return best, None
        if temperature != self.temperature:
            raise UserError(
                f"the cached top-k targets were made at temperature {self.temperature:g}, not {temperature:g}",
                "Prepare them again at the serving temperature, or cache hidden states.",
            )
        known = wide(self.log_probs[span])
        known = known - known.logsumexp(-1, keepdim=True).clamp_(min=0)  # stored in half precision they may exceed 1
        tail = (1 - known.exp().sum(-1, keepdim=True)).clamp_(min=0).log_()

        def with_tail(log_q: Tensor) -> Tensor:
            width = log_q.shape[-1]
            if self.vocabulary is not None:  # one more column takes what the drafter does not have
                log_q = F.pad(log_q, (0, 1), value=-torch.inf)
            rest = log_q.scatter(-1, index, -torch.inf)
            rest.add_(tail - rest.logsumexp(-1, keepdim=True)).clamp_(min=NOTHING)
            return rest.scatter_(-1, index, known.clamp(min=NOTHING).to(rest.dtype))[..., :width]

        return best, with_tail


@dataclass(frozen=True)
class ArgmaxTarget:
    """Cached argmax tokens [T]: p is known only as one-hot, which is all that greedy serving needs."""

    index: Tensor

    def cut(self, span: slice) -> ArgmaxTarget:
        return ArgmaxTarget(self.index[span])

    def within(self, vocabulary: int) -> tuple[ArgmaxTarget, Tensor | None]:
        unknown = self.index >= vocabulary
        return ArgmaxTarget(self.index.masked_fill(unknown, 0)), unknown

    def read(self, span: slice, _temperature: float) -> tuple[Tensor, LogProbs | None]:
        return self.index[span].long(), None


def wide_dtype(t: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(t.dtype, torch.float32)


def wide(t: Tensor) -> Tensor:
    """`t` in its `wide_dtype`."""
    return t.to(wide_dtype(t))
