"""How many tokens to draft next: a fixed γ, or one chosen from measured costs and acceptance."""

from __future__ import annotations

from typing import Protocol

RETRY_FIRST, RETRY_LAST = 32, 512  # tokens without drafting before the next try; doubles after each failed one
TRIAL_ROUNDS = 4
DECAY = 0.97


class Controller(Protocol):
    max_gamma: int

    def choose(self) -> int: ...
    def observe(self, drafted: int, accepted: int, draft_s: float, verify_s: float) -> None: ...


class FixedGamma:
    def __init__(self, gamma: int):
        self.max_gamma = gamma

    def choose(self) -> int:
        return self.max_gamma

    def observe(self, drafted: int, accepted: int, draft_s: float, verify_s: float) -> None:
        """Nothing to learn."""


class AutoGamma:
    """Maximise expected tokens per second, (1 + a + .. + a^γ) / (d(γ) + v(γ + 1)).

    a is the chance that a proposal passes given that those before it did; d(γ) the seconds to draft γ tokens, whose
    first one costs more; v(T) the seconds of a target forward over T rows. All are running estimates. When γ = 0 wins,
    drafting stops and is tried again later for a few rounds.
    """

    def __init__(self, max_gamma: int, verify_costs: dict[int, float], draft_cost: float):
        """`verify_costs` maps rows to measured seconds (one row count at least); `draft_cost` is one draft token's."""
        self.max_gamma = max_gamma
        self._verify = dict(verify_costs)
        self._draft = {0: 0.0, 1: draft_cost}
        self._passed, self._tried = 3.0, 5.0  # a prior worth five trials
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

    def observe(self, drafted: int, accepted: int, draft_s: float, verify_s: float) -> None:
        rows = drafted + 1
        self._verify[rows] = _blend(self._verify.get(rows), verify_s)
        if drafted == 0:
            self._idle += 1
            return
        self._trials = max(0, self._trials - 1)
        self._draft[drafted] = _blend(self._draft.get(drafted), draft_s)
        self._passed = DECAY * self._passed + accepted
        self._tried = DECAY * self._tried + min(accepted + 1, drafted)

    @property
    def acceptance(self) -> float:
        """Chance that a proposal passes given that those before it did."""
        return min(self._passed / self._tried, 0.999)

    def _rate(self, gamma: int) -> float:
        a = self.acceptance
        tokens = (1 - a ** (gamma + 1)) / (1 - a)
        return tokens / (_cost(self._draft, gamma) + _cost(self._verify, gamma + 1))


def _cost(known: dict[int, float], size: int) -> float:
    """Linear between measured sizes, along the outermost slope beyond them, never falling there."""
    if size in known:
        return known[size]
    below, above = sorted(n for n in known if n < size), sorted(n for n in known if n > size)
    if not below:
        return known[above[0]]
    if not above:
        low, high = below[-2:] if len(below) > 1 else 2 * below
        slope = (known[high] - known[low]) / (high - low) if high > low else 0.0
        return known[high] + max(slope, 0.0) * (size - high)
    low, high = below[-1], above[0]
    share = (size - low) / (high - low)
    return (1 - share) * known[low] + share * known[high]


def _blend(old: float | None, new: float, weight: float = 0.2) -> float:
    """Running estimate that a single stall cannot move far: a new value counts for at most three times the old."""
    return new if old is None else (1 - weight) * old + weight * min(new, 3 * old)
