"""From logits to tokens: the serving distribution, and the verification that makes speculation lossless.

Everything here is pure: (logits, draft, randomness) in, tokens out. Probabilities are fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bdcli.base.errors import NonFiniteError


@dataclass(frozen=True)
class Sampling:
    """Serving settings. temperature 0 is greedy, a branch of its own; top_k 0 and top_p 1 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def distribution(self, logits: Tensor) -> Tensor:
        """Serving probabilities [T, V] of logits [T, V]: temperature, then top-k, then top-p, renormalised.

        top-p keeps the smallest set of most likely tokens whose mass reaches p (Holtzman et al. 2020).
        """
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            kth = logits.topk(self.top_k, -1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        probs = logits.softmax(-1)
        if self.top_p < 1.0:
            ordered, index = probs.sort(-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p  # mass before the token already suffices
            probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), 0.0)
            probs = probs / probs.sum(-1, keepdim=True)
        return probs


@dataclass(frozen=True)
class Verdict:
    """Tokens to emit: the `accepted` first draft tokens, then one recovered or bonus token."""

    tokens: list[int]
    accepted: int


def non_finite(who: str) -> NonFiniteError:
    return NonFiniteError(f"the {who} produced non-finite logits (NaN or infinity); its weights or dtype are broken")


def best_tokens(logits: Tensor, who: str) -> list[int]:
    """Argmax of each row of logits [T, V], the first of equals. Raises NonFiniteError: a NaN counts as the largest."""
    if logits.device.type == "cpu":  # a few calls of numpy are quicker than as many of torch
        rows = logits.numpy()
        index = rows.argmax(-1)
        top = rows[np.arange(len(rows)), index]
        finite = bool(np.isfinite(top).all())
    else:
        top, index = logits.max(-1)
        finite = bool(top.isfinite().all())
    if not finite:
        raise non_finite(who)
    return index.tolist()


def check_finite(logits: Tensor, who: str) -> None:
    best_tokens(logits, who)


def draw(probs: Tensor, generator: torch.Generator) -> int:
    """One token from probabilities [V]."""
    return int(torch.multinomial(probs, 1, generator=generator))


def verify_greedy(draft: list[int], logits: Tensor) -> Verdict:
    """Accept while the draft is the target's argmax. logits [γ+1, V] for the positions of the draft and one more."""
    best = best_tokens(logits, "target")
    accepted = 0
    while accepted < len(draft) and draft[accepted] == best[accepted]:
        accepted += 1
    return Verdict([*draft[:accepted], best[accepted]], accepted)


def verify_sampled(draft: list[int], q: Tensor | None, p: Tensor, generator: torch.Generator) -> Verdict:
    """Speculative sampling (Leviathan et al. 2023, Chen et al. 2023): exact in distribution for any drafter.

    Draft token x_i was drawn from q[i]; it is accepted with probability min(1, p[i, x_i] / q[i, x_i]); at the first
    rejection a token is drawn from the residual max(0, p - q), normalised; after γ acceptances from p[γ].
    q [γ, V] (None for an empty draft), p [γ+1, V], both after the same temperature, top-k and top-p.
    """
    if draft:
        index = torch.tensor(draft, device=p.device)[:, None]
        drawn_p, drawn_q = p[:-1].gather(1, index)[:, 0].cpu(), q.gather(1, index)[:, 0].cpu()
        uniform = torch.rand(len(draft), generator=generator, device=generator.device).cpu()
        rejected = (uniform * drawn_q >= drawn_p).tolist()
        accepted = rejected.index(True) if True in rejected else len(draft)
        if accepted < len(draft):
            residual = (p[accepted] - q[accepted]).clamp_(min=0)
            # p = q up to rounding leaves no residual; then a rejection itself was rounding, and p is the limit
            residual = residual if float(residual.sum()) > 0 else p[accepted]
            return Verdict([*draft[:accepted], draw(residual, generator)], accepted)
    return Verdict([*draft, draw(p[len(draft)], generator)], len(draft))
