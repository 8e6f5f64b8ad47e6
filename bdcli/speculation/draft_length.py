"""How many tokens to draft next: a fixed γ, or one chosen from measured costs and acceptance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

RETRY_FIRST, RETRY_LAST = 32, 512  # tokens without drafting before the next try; doubles after each failed one
TRIAL_ROUNDS = 4
DECAY = 0.95  # weight of earlier rounds, per round
PRIOR = 7.0, 10.0  # proposals passed and tried before the first round
STALL = 1.5  # a round counts for at most so many times what it was expected to take
OWN_WEIGHT = 16.0  # rounds of a γ that say as much of its cost as those before the first round


class Controller(Protocol):
    max_gamma: int

    def choose(self) -> int: ...
    def observe(self, drafted: int, accepted: int, seconds: float) -> None: ...


class FixedGamma:
    def __init__(self, gamma: int):
        self.max_gamma = gamma

    def choose(self) -> int:
        return self.max_gamma

    def observe(self, drafted: int, accepted: int, seconds: float) -> None:
        """Nothing to learn."""


class AutoGamma:
    """Maximise expected tokens per second, (1 + a + .. + a^γ) / c(γ).

    a is the chance that a proposal passes given that those before it did, a running estimate; c(γ) is `RoundCosts.of`.
    When γ = 0 wins, drafting stops and is tried again later for a few rounds.
    """

    def __init__(self, max_gamma: int, costs: Mapping[int, float]):
        """`costs` maps γ to measured seconds of a round: 0, and one γ at least that drafts."""
        self.max_gamma = max_gamma
        self._costs = RoundCosts(costs)
        self._passed, self._tried = PRIOR
        self._idle = 0  # tokens since drafting stopped
        self._wait = RETRY_FIRST
        self._trials = TRIAL_ROUNDS  # rounds that draft whatever the estimate says: the first ones, and each retry

    def choose(self) -> int:
        best = max(range(self.max_gamma + 1), key=self._rate)
        if best == 0 and self._trials == 0 and self._idle >= self._wait:
            self._trials, self._idle = TRIAL_ROUNDS, 0
            self._wait = min(2 * self._wait, RETRY_LAST)
        if best == 0 and self._trials > 0:
            return min(2, self.max_gamma)
        if best > 0 and self._trials == 0:
            self._wait = RETRY_FIRST
        return best

    def observe(self, drafted: int, accepted: int, seconds: float) -> None:
        self._costs.add(drafted, seconds)
        if drafted == 0:
            self._idle += 1
            return
        self._trials = max(0, self._trials - 1)
        self._passed = DECAY * self._passed + accepted
        self._tried = DECAY * self._tried + min(accepted + 1, drafted)

    @property
    def acceptance(self) -> float:
        """Chance that a proposal passes given that those before it did."""
        return min(self._passed / self._tried, 0.999)

    def _rate(self, gamma: int) -> float:
        a = self.acceptance
        return (1 - a ** (gamma + 1)) / (1 - a) / self._costs.of(gamma)


class RoundCosts:
    """Seconds of a round by γ: those measured beforehand, times how fast the machine is now, times what γ's own rounds
    have shown.

    A slow minute moves all γ alike, so that it cannot keep one of them from being tried again; a γ's own rounds count
    the more of them there are.
    """

    def __init__(self, measured: Mapping[int, float]):
        """Noise only adds: no γ costs more than a larger one did."""
        self._shape: dict[int, float] = {}
        for gamma in sorted(measured, reverse=True):
            self._shape[gamma] = min([measured[gamma], *self._shape.values()])
        self._speed = 1.0
        self._own: dict[int, tuple[float, float]] = {}  # weight and ratio of the rounds of a γ

    def add(self, gamma: int, seconds: float) -> None:
        ratio = min(seconds / _between(self._shape, gamma), STALL * self._speed)
        self._speed += (1 - DECAY) * (ratio - self._speed)
        weight, own = self._own.get(gamma, (0.0, 1.0))
        weight = DECAY * weight + 1
        self._own[gamma] = weight, own + (ratio / self._speed - own) / weight

    def of(self, gamma: int) -> float:
        weight, own = self._own.get(gamma, (0.0, 1.0))
        return _between(self._shape, gamma) * self._speed * (OWN_WEIGHT + weight * own) / (OWN_WEIGHT + weight)


def _between(known: Mapping[int, float], size: int) -> float:
    """Linear between measured sizes, along the outermost slope beyond them."""
    if size in known:
        return known[size]
    below, above = sorted(n for n in known if n < size), sorted(n for n in known if n > size)
    if not below:
        return known[above[0]]
    if not above:
        low, high = below[-2:] if len(below) > 1 else 2 * below
        slope = (known[high] - known[low]) / (high - low) if high > low else 0.0
        return known[high] + slope * (size - high)
    low, high = below[-1], above[0]
    share = (size - low) / (high - low)
    return (1 - share) * known[low] + share * known[high]
