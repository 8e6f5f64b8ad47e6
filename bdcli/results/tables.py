"""Runs and measurements as table, markdown, csv or json text. No torch here."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable

from sqlmodel import SQLModel

from bdcli.results.figures import figures_of
from bdcli.results.query import arrange
from bdcli.results.schema import Evaluation, Loss, Run


def _interval(run: Run) -> str:
    return "" if run.speedup_low is None else f"{run.speedup_low:.2f}–{run.speedup_high:.2f}"


# Columns of the report's table in their order, most wanted first; headings and formats are the schema's.
COLUMNS = (
    "dataset",
    "context",
    "arm",
    "budget",
    "gamma",
    "acceptance_rate",
    "acceptance_rate_no_loops",
    "mean_accepted_length",
    "tokens_per_second",
    "ar_tokens_per_second",
    "ar_variation",
    "speedup",
    "speedup_low",
    "peak_memory_bytes",
    "loop_rate",
    "output_equal",
    "valid",
    "max_drafter_entries",
    "select",
    "dtype",
    "target",
    "new_tokens",
    "status",
    "run_id",
)
# What a narrow terminal keeps, most wanted first; the other columns follow in their order.
PRIORITY = (
    "arm",
    "context",
    "budget",
    "speedup",
    "tokens_per_second",
    "acceptance_rate",
    "gamma",
    "dataset",
    "speedup_low",
    "valid",
    "run_id",
    "status",
)
FIGURES = figures_of(Run)
HEADINGS = [FIGURES[name].heading for name in COLUMNS]
# Cells that are more than their column's value.
WHOLE_ROW: dict[str, Callable[[Run], str]] = {"arm": lambda run: run.arm or run.method or "", "speedup_low": _interval}


def rows(runs: list[Run]) -> list[list[str]]:
    """Cells under `HEADINGS` for each run."""
    return [[_cell(run, name) for name in COLUMNS] for run in runs]


def _cell(run: Run, name: str) -> str:
    return WHOLE_ROW[name](run) if name in WHOLE_ROW else FIGURES[name].cell(getattr(run, name))


def as_json(runs: list[Run]) -> str:
    """Every column of the store, unformatted."""
    return json.dumps({"runs": _records(runs)}, indent=2, ensure_ascii=False)


def as_csv(runs: list[Run]) -> str:
    """Every column of the store, unformatted."""
    return _csv(list(Run.model_fields), _records(runs))


def _records(found: list[SQLModel]) -> list[dict]:
    """Rows as JSON values, by column, in the order of the schema."""
    raw = [row.model_dump(mode="json") for row in found]
    return [{name: values[name] for name in type(row).model_fields} for row, values in zip(found, raw)]


def markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_markdown(runs: list[Run]) -> str:
    return markdown(HEADINGS, rows(runs))


def _csv(names: list[str], records: list[dict]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({k: json.dumps(v) if isinstance(v, dict) else v for k, v in record.items()})
    return out.getvalue().rstrip("\n")


def as_table(runs: list[Run], width: int | None = None):
    """A rich table; columns in which no run has anything are left out, and those that do not fit into `width`."""
    from rich.table import Table

    cells = rows(runs)
    table = Table(header_style="bold", box=None, pad_edge=False)
    keep = _fitting(cells, width) if width else _filled(cells)
    for i in keep:
        table.add_column(HEADINGS[i], justify="left" if FIGURES[COLUMNS[i]].form.left else "right", no_wrap=True)
    for row in cells:
        table.add_row(*(row[i] for i in keep))
    return table


def _filled(cells: list[list[str]]) -> list[int]:
    """Indices of the columns in which a run has something."""
    return [i for i in range(len(COLUMNS)) if any(row[i] for row in cells)]


def _fitting(cells: list[list[str]], width: int) -> list[int]:
    """Of the filled columns those that fit into `width` characters, taken by priority, in the order of `COLUMNS`."""
    order = [COLUMNS.index(name) for name in (*PRIORITY, *(n for n in COLUMNS if n not in PRIORITY))]
    filled, keep = set(_filled(cells)), []
    for i in order:
        if i in filled:
            width -= max(len(HEADINGS[i]), *(len(row[i]) for row in cells)) + 2
            if width >= 0:
                keep.append(i)
    return sorted(keep)


def side_by_side(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: an arm a row, a data set and context a column, with speedup, its interval and tokens a second."""
    cells = [r for r in arrange(runs) if r.command == "bench" and r.tokens_per_second is not None]
    columns = list(dict.fromkeys((r.dataset, r.context) for r in cells))
    arms = list(dict.fromkeys((r.arm, r.budget, r.gamma) for r in cells))
    found = {((r.arm, r.budget, r.gamma), (r.dataset, r.context)): r for r in reversed(cells)}

    def show(run: Run | None) -> str:
        if run is None:
            return ""
        if not run.valid:
            return "invalid"
        return f"{run.speedup:.2f}× ({_interval(run)}) {run.tokens_per_second:.1f}"

    sizes = [f"{context // 1024}k" if context % 1024 == 0 else str(context) for _, context in columns]
    head = ["arm", *(f"{dataset} {size}" for (dataset, _), size in zip(columns, sizes))]
    return head, [[arm[0], *(show(found.get((arm, column))) for column in columns)] for arm in arms]


def sweep_line(runs: list[Run]) -> str:
    """One line on where a sweep stands: the fastest valid arm so far."""
    top = max((r for r in runs if r.valid and r.speedup is not None), key=lambda r: r.speedup, default=None)
    return f"{len(runs)} cells" + (f", best {top.arm} {top.speedup:.2f}× at {top.context}" if top else "")


def _acceptance_rows(evaluations: list[Evaluation]) -> list[list[str]]:
    """Acceptance of each data set, context and budget (rows) at each step (columns), for `bdcli report --run`."""
    steps = sorted({e.step for e in evaluations})
    cells = {(e.dataset, e.context, e.budget, e.step): e for e in evaluations}
    lines = [["dataset", "context", "budget", *(f"step {step}" for step in steps)]]
    for key in dict.fromkeys((e.dataset, e.context, e.budget) for e in evaluations):
        found = [cells.get((*key, step)) for step in steps]
        rates = [e.acceptance_rate if e else None for e in found]
        lines.append([*map(str, key), *map(FIGURES["acceptance_rate"].cell, rates)])
    return lines


def acceptance_table(evaluations: list[Evaluation], form: str) -> str:
    """The grid of one distil run as table, markdown, csv or json; csv and json hold every column, unformatted."""
    return _measurements("evaluations", Evaluation, evaluations, _acceptance_rows(evaluations), form)


def loss_table(found: list[Loss], form: str) -> str:
    """Held-out losses of one pretrain run, step by step, in the forms of `acceptance_table`."""
    head = ["step", "tokens", "context", "loss", "long context is worth"]
    body = [
        [str(x.step), str(x.tokens), str(x.context), f"{x.nll:.3f}", f"{x.tail_nll_short - x.tail_nll:+.3f} nat"]
        for x in found
    ]
    return _measurements("losses", Loss, found, [head, *body], form)


def _measurements(name: str, kind: type, found: list, rows: list[list[str]], form: str) -> str:
    raw = _records(found)
    if form == "json":
        return json.dumps({name: raw}, indent=2, ensure_ascii=False)
    if form == "csv":
        return _csv(list(kind.model_fields), raw)
    head, *body = rows
    if form == "markdown":
        return markdown(head, body)
    widths = [max(map(len, column)) for column in zip(head, *body)]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths)) for row in (head, *body))
