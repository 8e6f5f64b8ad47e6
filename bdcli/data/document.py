"""A document, and what a source holds beside documents: rows and files that are no text, and files passed over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from bdcli.base.files import digest
from bdcli.base.progress import Progress

HELD_OUT_SHARE = 0.08  # of the documents of a file or folder; stdlib has a list of its own
_NAMES_KEPT = 1000  # of failures; all are counted
_NAMES_SHOWN = 3  # of failures, and of each kind of file that is passed over


@dataclass(frozen=True)
class Document:
    """A text. `held_out`: it is for measuring and never trained on.

    `question` is what a prompt ends with after the text: a row's own, or the instruction of the data set.
    """

    name: str
    text: str
    held_out: bool
    question: str = ""


class UnreadableError(Exception):
    """A row or file is no text; the message says why and follows its name."""


@dataclass
class Unread:
    """What sources hold that is no document: what failed, as "FILE:LINE why", and files passed over, by kind."""

    failed: int = 0
    failures: list[str] = field(default_factory=list)  # the first ones
    passed_over: dict[str, list[str]] = field(default_factory=dict)

    def fail(self, where: object, why: object) -> None:
        """Count a row or file that should have been read."""
        self.failed += 1
        if len(self.failures) < _NAMES_KEPT:
            self.failures.append(f"{printable(str(where))} {why}")

    def pass_over(self, kind: str, name: str) -> None:
        """Count a file that is of no kind that is read."""
        self.passed_over.setdefault(kind, []).append(printable(name))

    def lines(self) -> Iterator[str]:
        """At most two lines for people: what failed, and what was passed over."""
        if self.failed:
            first = self.failures[:_NAMES_SHOWN]
            more = [f"and {self.failed - len(first)} more"] if self.failed > len(first) else []
            rows = "1 row or file" if self.failed == 1 else f"{self.failed} rows or files"
            yield f"{rows} could not be read: {'; '.join(first + more)}"
        if self.passed_over:
            count = sum(map(len, self.passed_over.values()))
            kinds = (f"{len(names)} {kind} ({_listed(names)})" for kind, names in sorted(self.passed_over.items()))
            yield f"{count} file{'s' * (count > 1)} passed over: {', '.join(kinds)}"

    def note(self, progress: Progress) -> None:
        """Show the lines."""
        for line in self.lines():
            progress.note(line)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + ", ..." * (len(names) > _NAMES_SHOWN)


def printable(name: str) -> str:
    """A file's name as text: bytes that are not UTF-8 are escaped."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # no file's name
        return name.encode("utf-8", "backslashreplace").decode()


def is_held_out(name: str) -> bool:
    """Whether a document of this name is for measuring; a function of the name alone."""
    return int(digest(name.encode())[:8], 16) < HELD_OUT_SHARE * 2**32
