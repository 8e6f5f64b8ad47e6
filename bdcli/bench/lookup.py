"""Prompt lookup (Saxena 2023): the draft is what followed the last n-gram where it stood before.

No model: on text that repeats its prompt it is hard to beat, so a drafter has to be compared with it.
"""

from __future__ import annotations

from dataclasses import dataclass

GRAMS = (3, 2, 1)  # longest first


@dataclass
class _Nothing:
    """A lookup stores no keys."""

    kv_bytes: int = 0
    peak_entries: int = 0


class Lookup:
    """A `Proposer`: continues from the latest earlier place where the last 3, else 2, else 1 tokens stand."""

    def __init__(self):
        self.cache = _Nothing()
        self.length = 0
        self._latest: dict[tuple[int, ...], int] = {}  # n-gram -> index after its latest occurrence

    def prefill(self, tokens: list[int], progress=None) -> None:  # noqa: ARG002
        self._latest.clear()
        self.length = 0
        self._index(tokens)

    def propose(self, ids: list[int], gamma: int) -> list[int]:
        self._index(ids[:-1])  # the last token ends the n-gram that is looked up, so it is not in the index yet
        for n in GRAMS:
            at = self._latest.get(tuple(ids[-n:]))
            if at is not None and len(ids) > n:
                return ids[at : at + gamma]
        return []

    def rollback(self, length: int) -> None:
        """Only emitted tokens are indexed, and those stay."""

    def _index(self, ids: list[int]) -> None:
        for end in range(self.length, len(ids)):
            for n in GRAMS:
                if end + 1 >= n:
                    self._latest[tuple(ids[end + 1 - n : end + 1])] = end + 1
        self.length = max(self.length, len(ids))
