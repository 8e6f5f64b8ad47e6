"""Where long work reports while it runs. It is handed in at construction and never exchanged."""

from __future__ import annotations

from collections.abc import Sequence


class Progress:
    """Ignores everything. The console shows it (`bdcli.base.console`); a recorder stores it and passes it on."""

    def note(self, line: str) -> None:
        """A line for people."""

    def advance(self, phase: str, done: float, total: float, detail: str = "") -> None:
        """`done` of `total` units of a named phase."""

    def text(self, piece: str) -> None:
        """Generated text that will not change any more."""

    def measured(self, rows: Sequence[object], **at: int) -> None:
        """Figures as they come: dataclass rows, or rows of the store; `at` says where, such as step and tokens."""


SILENT = Progress()
