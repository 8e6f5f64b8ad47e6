"""Prompt lookup (Saxena 2023): the draft is what followed an earlier occurrence of the last n-gram.

It needs no model and is hard to beat on text that repeats its prompt, so a drafter has to be compared with it.
"""

from __future__ import annotations

from collections.abc import Callable

from bdcli.speculation.drafter import Draft

GRAMS = (3, 2, 1)  # longest first


class Lookup:
    """A `Drafter` that copies from behind the latest earlier occurrence of the last 3, else 2, else 1 tokens."""

    runner = None
    peak_entries = kv_bytes = weight_bytes = 0  # it stores no keys

    def __init__(self):
        self.length = 0
        self._latest: dict[tuple[int, ...], int] = {}  # n-gram -> index after its latest occurrence

    def bind(self, target: object) -> None:
        """It copies text, whoever verifies."""

    def prefill(self, tokens: list[int], on_block: Callable[[int, int], None] | None = None) -> None:  # noqa: ARG002
        self._latest.clear()
        self.length = 0
        self._index(tokens)

    def draft(self, ids: list[int], gamma: int, *_sampling: object) -> Draft:
        self._index(ids[:-1])  # the last token ends the n-gram that is looked up, so it is not in the index yet
        for n in GRAMS:
            at = self._latest.get(tuple(ids[-n:]))
            if at is not None and len(ids) > n:
                return Draft(ids[at : at + gamma], None)
        return Draft([], None)

    def rehearse(self, ids: list[int], gamma: int, *_sampling: object) -> Draft:
        """The last token, repeated: what stands there does not change the cost."""
        return Draft(gamma * ids[-1:], None)

    def rollback(self, length: int) -> None:
        """Only emitted tokens are indexed, and those stay."""

    def _index(self, ids: list[int]) -> None:
        for end in range(self.length, len(ids)):
            for n in GRAMS:
                if end + 1 >= n:
                    self._latest[tuple(ids[end + 1 - n : end + 1])] = end + 1
        self.length = max(self.length, len(ids))
