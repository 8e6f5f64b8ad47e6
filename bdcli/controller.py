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
    """Maximise expected tokens per second, (1 + a + .. + a^γ) / (γ·d + v(γ + 1)).

    a is the chance that a proposal passes given that those before it did; d the seconds per draft token; v(T) the
    seconds of a target forward over T rows. All three are running estimates. When γ = 0 wins, drafting stops and is
    tried again later for a few rounds.
    """

    def __init__(self, max_gamma: int, verify_costs: dict[int, float], draft_cost: float):
        """`verify_costs` maps rows to measured seconds (one row count at least); `draft_cost` is one draft token's."""
        self.max_gamma = max_gamma
        self._verify = dict(verify_costs)
        self._draft = draft_cost
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
        self._draft = _blend(self._draft, draft_s / drafted)
        self._passed = DECAY * self._passed + accepted
        self._tried = DECAY * self._tried + min(accepted + 1, drafted)

    @property
    def acceptance(self) -> float:
        """Chance that a proposal passes given that those before it did."""
        return min(self._passed / self._tried, 0.999)

    def _rate(self, gamma: int) -> float:
        a = self.acceptance
        tokens = (1 - a ** (gamma + 1)) / (1 - a)
        return tokens / (gamma * self._draft + self._verify_cost(gamma + 1))

    def _verify_cost(self, rows: int) -> float:
        """Linear between measured row counts, proportional to the outermost slope beyond, never below fewer rows."""
        if rows in self._verify:
            return self._verify[rows]
        known = sorted(self._verify)
        below = [r for r in known if r < rows]
        above = [r for r in known if r > rows]
        if not below:
            return self._verify[above[0]]
        if not above:
            low, high = (below[-2:] * 2)[:2] if len(below) == 1 else below[-2:]
            slope = (self._verify[high] - self._verify[low]) / (high - low) if high > low else 0.0
            return self._verify[high] + max(slope, 0.0) * (rows - high)
        low, high = below[-1], above[0]
        share = (rows - low) / (high - low)
        return (1 - share) * self._verify[low] + share * self._verify[high]


def _blend(old: float | None, new: float, weight: float = 0.2) -> float:
    """Running estimate that a single stall cannot move far: a new value counts for at most three times the old."""
    return new if old is None else (1 - weight) * old + weight * min(new, 3 * old)
