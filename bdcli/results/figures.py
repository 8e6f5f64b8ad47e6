"""What a column of the store carries beside its type: meaning, heading in reports, and how it is written. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlmodel import Field, SQLModel


@dataclass(frozen=True)
class Form:
    """How values are written: alone in a table's cell, and in a sentence with their unit."""

    cell: Callable[[Any], str] = str
    sentence: Callable[[Any], str] = str
    left: bool = False  # aligned to the left of its column


NUMBER = Form()
TEXT = Form(left=True)
NAME = Form(cell=lambda path: path.rstrip("/").rsplit("/", 1)[-1], left=True)
PERCENT = Form(lambda share: f"{100 * share:.1f} %", "{:.1%}".format)
LENGTH = Form("{:.2f}".format, "{:.2f}".format)
SECONDS = Form("{:.2f}".format, "{:.2f} s".format)
SPEED = Form("{:.1f}".format, "{:.1f} tok/s".format)
RATIO = Form("{:.2f}×".format, "{:.2f}×".format)
BYTES = Form(lambda size: f"{size / 1e6:.0f} MB", lambda size: f"{size / 1e6:.0f} MB")
YES_NO = Form({True: "yes", False: "NO"}.__getitem__, {True: "yes", False: "NO"}.__getitem__)


@dataclass(frozen=True)
class Figure:
    """`heading`: of its column in reports, empty where it has none. `missing`: in a sentence, for a value of None.

    `largest`: of the prompts of a cell the largest value counts. `against_ar`: it compares with the AR baseline, so
    nothing of it is shown when the baseline does not fit.
    """

    form: Form = NUMBER
    heading: str = ""
    missing: str = "not measured"
    largest: bool = False
    against_ar: bool = False

    def cell(self, value: object) -> str:
        return "" if value is None else self.form.cell(value)

    def sentence(self, value: object) -> str:
        return self.missing if value is None else self.form.sentence(value)


def figure(meaning: str, form: Form = NUMBER, heading: str = "", **settings: Any) -> Any:
    """A nullable column. `settings` are those of `Figure`, the others go to SQLModel's Field."""
    own = {name: settings.pop(name) for name in ("missing", "largest", "against_ar") if name in settings}
    extra = {"json_schema_extra": {"figure": Figure(form, heading, **own)}}
    return Field(**{"default": None, "description": meaning, "schema_extra": extra} | settings)


def figures_of(model: type[SQLModel]) -> dict[str, Figure]:
    """{column: its figure}, in the order of the table."""
    return {
        name: field.json_schema_extra["figure"] if field.json_schema_extra else Figure()
        for name, field in model.model_fields.items()
    }
