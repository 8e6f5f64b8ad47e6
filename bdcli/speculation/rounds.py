"""One round of speculation, and targets that run a round as one program."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Round:
    """One round. `logits` [drafted + 1, V] are the target's, for checks; they live until the next round.

    device_s: seconds that the device worked on it, where a round is one piece of work on a device of its own.
    """

    tokens: list[int]
    drafted: int
    accepted: int
    draft_s: float
    verify_s: float
    logits: Tensor = field(repr=False)
    device_s: float | None = None

    @property
    def seconds(self) -> float:
        return self.draft_s + self.verify_s


class WholeRounds(Protocol):
    """A target and a drafter that run a round without the host in between (`bdcli.backends.cuda`)."""

    def play(self, ids: list[int], gamma: int) -> Round:
        """One round after `ids`, not appended to them; the caches hold what it read and wait for the rollback."""

    def rehearse(self, ids: list[int], gamma: int) -> float:
        """Seconds of a `play` that does not count, the random state untouched."""

    def plain(self, tokens: list[int]) -> tuple[Tensor, float]:
        """`Speculator.one_row`."""
