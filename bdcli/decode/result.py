"""The figures of one decode run, by the names of the store's columns, which are those of the JSON contract."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bdcli.results.schema import Figures


@dataclass(frozen=True)
class DecodeResult:
    """One text, the settings it was made with, and its figures; a rate is None where its denominator is 0.

    `settings` and `figures` are columns of the store (`bdcli.results.schema`); the other fields have no column of a
    run. rounds: as in `bdcli.results.metrics.RoundFigures.row`.
    """

    status: str
    settings: dict[str, object]
    figures: Figures
    tokens: list[int]
    text: str
    rounds: list[list[int | None]]
    attention_detail: str
    weight_bytes: int
    resident_bytes: int
    planned_bytes: int | None
    logit_error: float | None

    def columns(self) -> dict[str, object]:
        """Columns of the run's row."""
        return self.settings | self.figures.model_dump()

    def as_dict(self) -> dict[str, object]:
        """The fields of `bdcli decode --json`, without run_id."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("settings", "figures")}
        return own | self.columns()
