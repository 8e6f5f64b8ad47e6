"""Token ids back to text while they arrive, and where a stop string ends it."""

from __future__ import annotations

from dataclasses import dataclass

_REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


class TextStream:
    """Feed ids, get text that will not change any more. Bytes of an unfinished character are held back."""

    def __init__(self, tokenizer):
        self._decode = tokenizer.decode
        self._ids: list[int] = []
        self._start = self._read = 0  # the last stretch already read is decoded again for its context

    def feed(self, ids: list[int], end: bool = False) -> str:
        self._ids += ids
        before = self._decode(self._ids[self._start : self._read], skip_special_tokens=True)
        now = self._decode(self._ids[self._start :], skip_special_tokens=True)
        if now.endswith(_REPLACEMENT) and not end:
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]


@dataclass
class StopText:
    """Holds text back while it may be the beginning of a stop string."""

    stops: tuple[str, ...]
    _held: str = ""
    found: bool = False

    def feed(self, text: str, end: bool = False) -> str:
        """Text that is safe to show. After a stop string is complete, `found` is set and the rest is dropped."""
        if self.found:
            return ""
        text = self._held + text
        places = [text.find(stop) for stop in self.stops if stop in text]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = 0 if end else max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
