"""Acceptance without a rollout: teacher-force a text the target wrote and replay what decoding would have done.

Whatever the drafter, decoding emits text of the target's own distribution. Given that it emitted y, its drafter's
proposal was accepted there with probability min(1, q(y) / p(y)), independently of the rest: it proposes y and keeps it
with probability min(p, q), and y is emitted with probability p (Leviathan et al. 2023). Greedy is the case where these
probabilities are 0 or 1, the drafter's hits; then the replay gives drafted and accepted tokens of real decoding exactly
(fp32), else their expectation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bdcli.base.statistics import bootstrap
from bdcli.cache.full import FullCache
from bdcli.cache.kinds import TORCH_CACHES
from bdcli.cache.selection import CacheSize, Selection
from bdcli.model.llama import Model
from bdcli.results.metrics import looped_tokens
from bdcli.speculation.runner import Runner
from bdcli.speculation.sampling import Sampling

GREEDY = Sampling()
BLOCK_TOKENS = 64  # read by one forward
MIN_INTERVAL_PASSAGES = 3  # for a bootstrap interval


@dataclass(frozen=True)
class Passage:
    """A prompt and what the target wrote after it; `limit` is the max_new_tokens it was written under.

    `probs` are the target's serving probabilities of the text's tokens; empty where it was written greedily.
    """

    dataset: str
    prompt: tuple[int, ...]
    text: tuple[int, ...]
    limit: int
    probs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Replay:
    """Counts of one decoding of one passage; expected counts when sampling. clean: rounds that begin outside loops."""

    rounds: float
    drafted: float
    accepted: float
    tokens: int
    clean_drafted: float
    clean_accepted: float


@dataclass(frozen=True)
class Cell:
    """Acceptance of one context and budget, pooled over passages, with a bootstrap interval over them."""

    dataset: str
    context: int
    budget: int | str
    gamma: int
    acceptance_rate: float | None
    acceptance_rate_no_loops: float | None
    low: float | None
    high: float | None
    mean_accepted_length: float | None
    passages: int

    @property
    def score(self) -> float:
        """What a drafter is judged by: its rate outside loops, which suit every drafter, where there is such text."""
        rate = self.acceptance_rate if self.acceptance_rate_no_loops is None else self.acceptance_rate_no_loops
        return rate or 0.0


def accept_probabilities(
    drafter: Model,
    passage: Passage,
    selection: Selection,
    sampling: Sampling = GREEDY,
    vocabulary: int | None = None,
) -> list[float]:
    """For each token of the text: the probability that decoding accepts it, under the view of `selection`.

    Greedy: 1 where the token is the drafter's choice, else 0. `vocabulary` is the target's size, the drafter's by
    default.
    """
    prompt, text = list(passage.prompt), list(passage.text)
    total = len(prompt) + passage.limit
    cache = selection.cache(TORCH_CACHES, drafter, CacheSize(len(prompt) - 1, total, total))
    runner = Runner(drafter, cache, vocabulary)
    runner.prefill(prompt[:-1])
    fed, found = [prompt[-1], *text[:-1]], []
    while len(found) < len(text):
        block = fed[len(found) : len(found) + min(cache.max_rows, BLOCK_TOKENS)]
        logits, wanted = runner.feed(block, len(block)), text[len(found) : len(found) + len(block)]
        if sampling.greedy:
            found += [float(b == t) for b, t in zip(logits.argmax(-1).tolist(), wanted)]
        else:
            q = token_probs(sampling.distribution(logits), wanted)
            found += [min(1.0, a / p) for a, p in zip(q, passage.probs[len(found) :])]
    return found


def text_probs(target: Model, prompt: Sequence[int], text: Sequence[int], sampling: Sampling) -> list[float]:
    """The target's serving probability of each token of `text`, written after `prompt`."""
    cache = FullCache(target, len(prompt) + len(text))
    target.prefill(list(prompt[:-1]), cache)
    fed, found = [prompt[-1], *text[:-1]], []
    for at in range(0, len(text), BLOCK_TOKENS):
        block = fed[at : at + BLOCK_TOKENS]
        logits = target.forward(block, cache, len(block))
        found += token_probs(sampling.distribution(logits), text[at : at + BLOCK_TOKENS])
    return found


def token_probs(probs: Tensor, tokens: Sequence[int]) -> list[float]:
    """Probabilities of `tokens`, one of each row of probs [T, V]."""
    return probs.gather(1, torch.tensor(tokens, device=probs.device)[:, None])[:, 0].tolist()


def replay(accepts: Sequence[float], gamma: int, limit: int, looped: Sequence[bool] = ()) -> Replay:
    """Rounds of decoding with fixed `gamma`, as `Speculator.rounds` plays them, from each token's accept probability.

    `looped` marks tokens that stand inside loops, as `metrics.looped_tokens` does; none by default.
    starts[t] is the probability that a round begins at token t; a round that accepts k tokens ends k + 1 further on.
    """
    size = len(accepts)
    starts = [1.0] + [0.0] * (size + gamma)
    rounds = drafted = accepted = clean_drafted = clean_accepted = 0.0
    for at in range(size):
        begins = starts[at]
        if begins == 0.0:
            continue
        proposed = min(gamma, limit - at - 1)
        clean = not looped or not looped[at]
        rounds, drafted = rounds + begins, drafted + begins * proposed
        clean_drafted += clean * begins * proposed
        for k in range(proposed):
            probability = accepts[at + k] if at + k < size else 0.0
            starts[at + k + 1] += begins * (1 - probability)
            begins *= probability
            accepted += begins
            clean_accepted += clean * begins
        starts[at + proposed + 1] += begins
    return Replay(rounds, drafted, accepted, size, clean_drafted, clean_accepted)


def acceptance_grid(
    drafter: Model,
    passages: Sequence[Passage],
    selections: Sequence[Selection],
    gamma: int,
    sampling: Sampling = GREEDY,
    vocabulary: int | None = None,
) -> Iterator[Cell]:
    """Every data set and context among `passages`, under every one of `selections`; `vocabulary` is the target's."""
    groups: dict[tuple[str, int], list[Passage]] = {}
    for p in passages:
        groups.setdefault((p.dataset, len(p.prompt)), []).append(p)
    for group, selection in itertools.product(groups.values(), selections):
        yield acceptance_cell(drafter, group, selection, gamma, sampling, vocabulary)


def acceptance_cell(
    drafter: Model,
    passages: Sequence[Passage],
    selection: Selection,
    gamma: int,
    sampling: Sampling = GREEDY,
    vocabulary: int | None = None,
) -> Cell:
    """Pooled acceptance over passages of one data set and context, replayed with draft length `gamma`."""
    played = []
    for p in passages:
        found = accept_probabilities(drafter, p, selection, sampling, vocabulary)
        played.append(replay(found, gamma, p.limit, looped_tokens(p.prompt, p.text)))
    low, high = _interval(played)
    drafted, clean = sum(p.drafted for p in played), sum(p.clean_drafted for p in played)
    return Cell(
        dataset=passages[0].dataset,
        context=len(passages[0].prompt),
        budget=selection.budget or "full",
        gamma=gamma,
        acceptance_rate=sum(p.accepted for p in played) / drafted if drafted else None,
        acceptance_rate_no_loops=sum(p.clean_accepted for p in played) / clean if clean else None,
        low=low,
        high=high,
        mean_accepted_length=sum(p.tokens for p in played) / sum(p.rounds for p in played),
        passages=len(played),
    )


def _interval(played: Sequence[Replay]) -> tuple[float | None, float | None]:
    """95 % percentile bootstrap over passages; None with fewer than MIN_INTERVAL_PASSAGES."""

    def rate(drawn: Sequence[Replay]) -> float:
        drafted = sum(p.drafted for p in drawn)
        return sum(p.accepted for p in drawn) / drafted if drafted else 0.0

    return bootstrap(played, rate) if len(played) >= MIN_INTERVAL_PASSAGES else (None, None)
