"""Numbers of a run, from its steps. No tensors, no models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LOOP_GRAM = 8
LOOP_REACH = 1024


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
    drafted: int
    accepted: int
    seconds: float


@dataclass(frozen=True)
class Metrics:
    """Figures of one generation; a rate is None where its denominator is 0."""

    new_tokens: int
    drafted: int
    accepted: int
    acceptance_rate: float | None
    acceptance_rate_no_loops: float | None
    mean_accepted_length: float | None
    tokens_per_second: float | None
    loop_rate: float | None


def measure(prompt: Sequence[int], new: Sequence[int], rounds: Sequence[Round]) -> Metrics:
    """A round counts as outside loops when its first token is: that does not depend on how the round went."""
    looped = looped_tokens(prompt, new)
    drafted, accepted = sum(r.drafted for r in rounds), sum(r.accepted for r in rounds)
    clean_drafted = clean_accepted = position = 0
    for r in rounds:
        if not looped[position]:
            clean_drafted, clean_accepted = clean_drafted + r.drafted, clean_accepted + r.accepted
        position += r.tokens
    seconds = sum(r.seconds for r in rounds)
    return Metrics(
        new_tokens=len(new),
        drafted=drafted,
        accepted=accepted,
        acceptance_rate=_ratio(accepted, drafted),
        acceptance_rate_no_loops=_ratio(clean_accepted, clean_drafted),
        mean_accepted_length=_ratio(len(new), len(rounds)),
        tokens_per_second=_ratio(len(new), seconds),
        loop_rate=_ratio(sum(looped), len(new)),
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
