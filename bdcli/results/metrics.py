"""Numbers of a run, from its steps. No tensors, no models."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

T = TypeVar("T")

LOOP_GRAM = 8
LOOP_REACH = 1024
RESAMPLES = 1000


def looped_tokens(prompt: Sequence[int], new: Sequence[int]) -> list[bool]:
    """For each new token: does it end an 8-gram already emitted, or standing in the 1,024 tokens before it?"""
    first = max(0, len(prompt) - LOOP_REACH - LOOP_GRAM)
    ids = [*prompt[first:], *new]
    boundary = len(prompt) - first
    latest: dict[tuple[int, ...], int] = {}
    looped = []
    for end in range(len(ids)):
        gram = tuple(ids[end - LOOP_GRAM + 1 : end + 1]) if end >= LOOP_GRAM - 1 else None
        if end >= boundary:
            before = latest.get(gram) if gram else None
            looped.append(before is not None and (before >= boundary or end - before <= LOOP_REACH))
        if gram:
            latest[gram] = end
    return looped


@dataclass(frozen=True)
class Round:
    """What the metrics need of one engine step."""

    tokens: int
    drafted: int | None  # None: a tool that does not tell
    accepted: int
    seconds: float
    looped: bool = False  # begins inside a loop; see `mark_loops`

    def row(self) -> list[int | None]:
        """As the store keeps it."""
        return [self.tokens, self.drafted, self.accepted, round(1e6 * self.seconds), int(self.looped)]


def mark_loops(prompt: Sequence[int], new: Sequence[int], rounds: Sequence[Round]) -> list[Round]:
    """Rounds that know whether they begin inside a loop: that does not depend on how the round went."""
    looped, marked, position = looped_tokens(prompt, new), [], 0
    for r in rounds:
        marked.append(replace(r, looped=looped[position]))
        position += r.tokens
    return marked


@dataclass(frozen=True)
class Metrics:
    """Figures of one generation; a rate is None where its denominator is 0."""

    new_tokens: int
    drafted: int | None
    accepted: int
    acceptance_rate: float | None
    acceptance_rate_no_loops: float | None
    mean_accepted_length: float | None
    tokens_per_second: float | None
    loop_rate: float | None


def measure(prompt: Sequence[int], new: Sequence[int], rounds: Sequence[Round]) -> Metrics:
    """Figures of one generation; acceptance and speed outside loops leave out the rounds that begin in one."""
    rounds = mark_loops(prompt, new, rounds)
    clean = [r for r in rounds if not r.looped]
    tells = all(r.drafted is not None for r in rounds)
    drafted = sum(r.drafted for r in rounds) if tells else None
    accepted = sum(r.accepted for r in rounds)
    return Metrics(
        new_tokens=len(new),
        drafted=drafted,
        accepted=accepted,
        acceptance_rate=_ratio(accepted, drafted),
        acceptance_rate_no_loops=_ratio(sum(r.accepted for r in clean), sum(r.drafted for r in clean))
        if tells
        else None,
        mean_accepted_length=_ratio(len(new), len(rounds)),
        tokens_per_second=_ratio(len(new), sum(r.seconds for r in rounds)),
        loop_rate=_ratio(sum(looped_tokens(prompt, new)), len(new)),
    )


def bootstrap(
    items: Sequence[T],
    statistic: Callable[[Sequence[T]], float | None],
    resamples: int = RESAMPLES,
    tail: float = 0.025,
) -> tuple[float | None, float | None]:
    """Percentile bootstrap interval of `statistic` over items drawn with replacement, `tail` left out at each end
    (Efron 1979): 95 % by default; each bound alone is a one-sided one of 1 - `tail`.

    None with fewer than two items, or where the statistic of all has no value.
    """
    if len(items) < 2 or statistic(items) is None:
        return None, None
    rng = random.Random(0)
    drawn = (statistic(rng.choices(items, k=len(items))) for _ in range(resamples))
    values = sorted(value for value in drawn if value is not None)
    return values[int(tail * len(values))], values[math.ceil((1 - tail) * len(values)) - 1]


def _ratio(part: float, whole: float | None) -> float | None:
    return part / whole if whole else None
