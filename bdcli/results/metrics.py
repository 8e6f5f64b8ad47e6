"""Numbers of a run, from its steps. No tensors, no models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bdcli.speculation.rounds import Round

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
class RoundFigures:
    """What the metrics need of one engine step."""

    tokens: int
    drafted: int | None  # None: a tool that does not report it
    accepted: int
    seconds: float
    looped: bool = False  # begins inside a loop; see `mark_loops`

    @classmethod
    def of(cls, done: Round) -> RoundFigures:
        """Figures of a round of the speculation engine."""
        return cls(len(done.tokens), done.drafted, done.accepted, done.seconds)

    def row(self) -> list[int | None]:
        """As the store keeps it."""
        return [self.tokens, self.drafted, self.accepted, round(1e6 * self.seconds), int(self.looped)]


def mark_loops(prompt: Sequence[int], new: Sequence[int], rounds: Sequence[RoundFigures]) -> list[RoundFigures]:
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


def measure(prompt: Sequence[int], new: Sequence[int], rounds: Sequence[RoundFigures]) -> Metrics:
    """Figures of one generation; acceptance and speed outside loops leave out the rounds that begin in one."""
    rounds = mark_loops(prompt, new, rounds)
    clean = [r for r in rounds if not r.looped]
    reported = all(r.drafted is not None for r in rounds)
    drafted = sum(r.drafted for r in rounds) if reported else None
    accepted = sum(r.accepted for r in rounds)
    return Metrics(
        new_tokens=len(new),
        drafted=drafted,
        accepted=accepted,
        acceptance_rate=_ratio(accepted, drafted),
        acceptance_rate_no_loops=_ratio(sum(r.accepted for r in clean), sum(r.drafted for r in clean))
        if reported
        else None,
        mean_accepted_length=_ratio(len(new), len(rounds)),
        tokens_per_second=_ratio(len(new), sum(r.seconds for r in rounds)),
        loop_rate=_ratio(sum(looped_tokens(prompt, new)), len(new)),
    )


def _ratio(part: float, whole: float | None) -> float | None:
    return part / whole if whole else None
