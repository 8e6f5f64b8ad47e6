"""Token ids back to text while they arrive, and where a stop string ends it."""

from __future__ import annotations

import re
from dataclasses import dataclass

_REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 sequence decodes to
_CHARACTER_TOKENS = 4  # a character has at most four bytes, so no more tokens can wait for its end
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # a byte of a character that the vocabulary lacks


class TextStream:
    """Feed ids, get text that will not change any more; all pieces together are what the ids decode to at once.

    The bytes of an unfinished character are kept back. So is a run of byte tokens (`<0xE4>`), which such tokenizers
    decode as a whole: one bad byte turns the run into replacement characters. Time is linear in the ids.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._decodes_runs = _decodes_runs(tokenizer)
        self._waiting: list[int] = []
        self._ready = 0  # of those that wait, how many may be decoded
        self._window: list[int] = []  # ids decoded last, which the next ones need as context
        self._shown = 0  # characters of the window's text that were returned

    def feed(self, ids: list[int], end: bool = False) -> str:
        """Text that `ids` complete; with `end` also what is unfinished."""
        for i in ids:
            token = None if i in self._special else self._tokenizer.convert_ids_to_tokens(i)
            if token is None:
                continue  # decoded to nothing, and no context of what follows
            self._waiting.append(i)
            if not (self._decodes_runs and _BYTE.fullmatch(token)):
                self._ready = len(self._waiting)
        fresh = len(self._waiting) if end else self._ready
        if not (fresh or end):
            return ""
        self._window += self._waiting[:fresh]
        del self._waiting[:fresh]
        self._ready = 0
        text = self._decode(self._window)
        unfinished = int(text.endswith(_REPLACEMENT) and not (end or self._decodes_runs))
        piece = text[self._shown : len(text) - unfinished]
        self._window = self._window[-_CHARACTER_TOKENS:]
        self._shown = len(self._decode(self._window)) - unfinished
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _decodes_runs(tokenizer) -> bool:
    """Whether bytes are tokens of their own that are decoded together."""
    ids = tokenizer.convert_tokens_to_ids(["<0xC3>", "<0xA9>"])
    known = None not in ids and tokenizer.convert_ids_to_tokens(ids) == ["<0xC3>", "<0xA9>"]
    return known and tokenizer.decode(ids).strip() == "\u00e9"


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
