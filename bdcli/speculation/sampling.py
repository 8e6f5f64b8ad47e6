"""From logits to tokens: the serving distribution, and the verification that makes speculation lossless.

Everything here is pure: (logits, draft, randomness) in, tokens out. Probabilities are fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bdcli.base.errors import NonFiniteError

SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Sampling:
    """Serving settings. temperature 0 is greedy, a branch of its own; the other defaults are off.

    The repetition penalty belongs to the logits and not to the distribution: see `SeenTokens.penalised`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def divisor(self) -> float:
        """The temperature as an fp32 number that is neither 0 nor infinite."""
        return min(max(self.temperature, SMALLEST), LARGEST)

    @property
    def mass(self) -> float:
        """top_p as an fp32 number that is not 0."""
        return max(self.top_p, SMALLEST)

    def distribution(self, logits: Tensor) -> Tensor:
        """Serving probabilities [T, V] of logits [T, V]: temperature, top-k, top-p, min-p in turn, renormalised.

        top-p keeps the smallest set of most likely tokens whose mass reaches p (Holtzman et al. 2020), min-p the tokens
        at least so likely as that share of the likeliest (Nguyen et al. 2024).
        """
        # differences to the largest overflow to -inf alone, whatever the temperature
        logits = (logits - logits.amax(-1, keepdim=True)) / self.divisor
        if 0 < self.top_k < logits.shape[-1]:
            kth = logits.topk(self.top_k, -1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        probs = logits.softmax(-1)
        if self.top_p < 1.0:
            ordered, index = probs.sort(-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.mass  # mass before the token already suffices
            probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), 0.0)
            probs = probs / probs.sum(-1, keepdim=True)
        if self.min_p > 0:
            probs = probs.masked_fill(probs < self.min_p * probs.amax(-1, keepdim=True), 0.0)
            probs = probs / probs.sum(-1, keepdim=True)
        return probs


class SeenTokens:
    """Which tokens of the vocabulary a text has, kept while the text grows, for the repetition penalty."""

    def __init__(self, vocab: int, device: torch.device | str):
        self._seen, self._read = torch.zeros(vocab, dtype=torch.bool, device=device), 0

    def read(self, ids: Sequence[int]) -> None:
        """Read the text `ids`; what it begins with may have been read already."""
        if len(ids) < self._read:
            self._seen.zero_()
            self._read = 0
        if len(ids) > self._read:
            self._seen[torch.tensor(ids[self._read :], device=self._seen.device)] = True
            self._read = len(ids)

    def penalised(self, logits: Tensor, penalty: float, ids: Sequence[int], draft: Sequence[int] = ()) -> Tensor:
        """Logits [T, V] with every token seen made less likely; the last row follows `ids` and all of `draft`.

        Each row before it follows one token less. As `transformers` has it (Keskar et al. 2019): a positive logit is
        divided by `penalty`, a negative one multiplied. `ids` continues what was read before.
        """
        self.read(ids)
        seen = self._seen.expand(logits.shape).clone()
        for row, token in enumerate(draft, len(logits) - len(draft)):
            seen[max(row, 0) :, token] = True
        return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


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
