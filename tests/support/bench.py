"""Small sweeps from the command line and their cells."""

from __future__ import annotations

from tests.support.cli import Outcome

SMALL = ["bench", "--ctx", "200", "--samples", 2, "--max-new-tokens", 12, "--dtype", "float32"]
BD = ["--methods", "bd", "--budgets", 64, "--gamma", 3]


def cells(done: Outcome) -> dict[tuple[int, str], dict]:
    """Cells by context and arm, of a sweep that succeeded."""
    assert done.code == 0, done.err
    return {(c["context"], c["arm"]): c for c in done.json["cells"]}


def reasons(done: Outcome) -> dict[str, str | None]:
    """Why the cell of each arm is invalid."""
    return {arm: cell["invalid_reason"] for (_, arm), cell in cells(done).items()}
