"""Acceptance without a rollout: teacher-force a text the target wrote and replay what decoding would have done.

Greedy decoding emits the target's own text whatever the drafter, so the drafter's hits along that text determine
every round: for a fixed γ the replay gives drafted and accepted tokens of real decoding exactly (fp32).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from bdcli.cache import BudgetCache, FullCache
from bdcli.model import Model
from bdcli.views import plan_view

RESAMPLES = 1000


@dataclass(frozen=True)
class Passage:
    """A prompt and what the target wrote after it; `limit` is the max_new_tokens it was written under."""

    dataset: str
    prompt: tuple[int, ...]
    text: tuple[int, ...]
    limit: int


@dataclass(frozen=True)
class Replay:
    """Counts of one decoding of one passage."""

    rounds: int
    drafted: int
    accepted: int
    tokens: int


@dataclass(frozen=True)
class Cell:
    """Acceptance of one context and budget, pooled over passages, with a bootstrap interval over them."""

    dataset: str
    context: int
    budget: int | str
    gamma: int
    acceptance_rate: float | None
    low: float | None
    high: float | None
    mean_accepted_length: float | None
    passages: int


def hits(drafter: Model, passage: Passage, budget: int | None, select: str, positions: str, gamma: int) -> list[bool]:
    """For each token of the text: would the drafter, reading everything before it in its view, have proposed it?"""
    prompt, text = list(passage.prompt), list(passage.text)
    total = len(prompt) + passage.limit
    cache: FullCache | BudgetCache
    if budget is None:
        cache = FullCache(drafter, total)
    else:
        cache = BudgetCache(drafter, total, plan_view(budget, select, positions, gamma, len(prompt) - 1), total)
    drafter.prefill(prompt[:-1], cache)
    fed, found = [prompt[-1], *text[:-1]], []
    while len(found) < len(text):
        block = fed[len(found) : len(found) + min(cache.max_rows, 64)]
        best = drafter.forward(block, cache, len(block)).argmax(-1).tolist()
        found += [b == t for b, t in zip(best, text[len(found) :])]
    return found


def replay(found: Sequence[bool], gamma: int, limit: int) -> Replay:
    """Rounds of greedy decoding with fixed `gamma`, as `Speculator.rounds` plays them."""
    at = rounds = drafted = accepted = 0
    while at < len(found):
        proposed = min(gamma, limit - at - 1)
        kept = 0
        while kept < proposed and at + kept < len(found) and found[at + kept]:
            kept += 1
        rounds, drafted, accepted = rounds + 1, drafted + proposed, accepted + kept
        at += kept + 1
    return Replay(rounds, drafted, accepted, len(found))


def acceptance_cell(
    drafter: Model, passages: Sequence[Passage], budget: int | None, select: str, positions: str, gamma: int
) -> Cell:
    """Pooled acceptance over passages of one data set and context."""
    played = [replay(hits(drafter, p, budget, select, positions, gamma), gamma, p.limit) for p in passages]
    low, high = _interval(played)
    drafted = sum(p.drafted for p in played)
    return Cell(
        dataset=passages[0].dataset,
        context=len(passages[0].prompt),
        budget="full" if budget is None else budget,
        gamma=gamma,
        acceptance_rate=sum(p.accepted for p in played) / drafted if drafted else None,
        low=low,
        high=high,
        mean_accepted_length=sum(p.tokens for p in played) / sum(p.rounds for p in played),
        passages=len(played),
    )


def _interval(played: Sequence[Replay]) -> tuple[float | None, float | None]:
    """95 % percentile bootstrap over passages; None with fewer than three."""
    if len(played) < 3:
        return None, None
    rng = random.Random(0)
    rates = []
    for _ in range(RESAMPLES):
        drawn = rng.choices(played, k=len(played))
        drafted = sum(p.drafted for p in drawn)
        rates.append(sum(p.accepted for p in drawn) / drafted if drafted else 0.0)
    rates.sort()
    return rates[int(0.025 * RESAMPLES)], rates[int(0.975 * RESAMPLES) - 1]
