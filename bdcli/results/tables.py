"""Read runs from the store, check and filter them, show them as table, markdown, csv or json. Never imports torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass

from sqlmodel import SQLModel

from bdcli.config.decode import parse_context
from bdcli.results.cells import best
from bdcli.results.figures import figures_of
from bdcli.results.gates import join_objections, seal_objections
from bdcli.results.schema import Evaluation, Loss, Run
from bdcli.results.store import Store

NEAR = 0.125  # `--ctx 8k` keeps contexts within this share of 8192


@dataclass(frozen=True)
class Filter:
    """Keeps runs that fit every given field; text is compared exactly."""

    ctx: str | None = None
    budget: str | None = None
    dataset: str | None = None
    method: str | None = None
    command: str | None = None
    status: str | None = None
    arm: str | None = None
    experiment: str | None = None

    def __call__(self, run: Run) -> bool:
        if self.ctx is not None and not _context_fits(run.context, self.ctx):
            return False
        named = ("budget", "dataset", "method", "command", "status", "arm", "experiment")
        return all(getattr(self, n) is None or str(getattr(run, n)) == getattr(self, n) for n in named)


def _context_fits(context: int | None, wanted: str) -> bool:
    """`8k` is nominal, within 12.5 %; `8192` is exact."""
    tokens = parse_context(wanted)
    if context is None:
        return False
    return abs(context - tokens) <= NEAR * tokens if wanted.strip().lower().endswith("k") else context == tokens


def checked(runs: list[Run], store: Store) -> list[Run]:
    """The runs, bench cells among them held against their baseline and their seal; what fails loses its speedup.

    No speed is ever joined with AR of another context, data set, machine or target, whatever the rows say.
    """
    known = {run.run_id: run for run in store.runs()}
    for run in runs:
        if run.command != "bench":
            continue
        if run.status != "done" and run.seal is None:  # begun, nothing to show yet
            _unjoin(run)
            continue
        ar = known.get(run.ar_run_id)
        mine, theirs = store.prompts(run.run_id), store.prompts(ar.run_id) if ar is not None else []
        why = [*join_objections(run, mine, ar, theirs), *seal_objections(run, mine, ar, theirs)]
        if why:
            run.valid, run.invalid_reason = False, "; ".join(why)
            _unjoin(run)
    return runs


def _unjoin(run: Run) -> None:
    for name, figure in figures_of(Run).items():
        if figure.against_ar:
            setattr(run, name, None)


def refused(runs: list[Run]) -> list[str]:
    """A line for every cell that is shown but may not be believed."""
    bad = [run for run in runs if run.valid is False]
    return [f"refused: {r.dataset} {r.context} {r.arm} ({r.run_id}): {r.invalid_reason}" for r in bad]


def arranged(runs: list[Run]) -> list[Run]:
    """Newest first, but the cells of one sweep together, by data set, context and the order of its arms."""
    place: dict[str, int] = {}
    for i, run in enumerate(runs):
        place.setdefault(run.experiment or run.run_id, i)
    return sorted(
        runs,
        key=lambda r: (
            (place[r.experiment or r.run_id], r.dataset or "", r.context or 0, r.started_at)
            if r.experiment
            else (place[r.run_id],)
        ),
    )


def best_cells(runs: list[Run]) -> list[Run]:
    """Of each data set, context, method and budget the fastest valid cell."""
    return best(runs, lambda r: (r.experiment, r.dataset, r.context, r.method, r.budget, r.drafter))


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
    return markdown(HEADINGS, rows(arranged(runs)))


def _csv(names: list[str], records: list[dict]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({k: json.dumps(v) if isinstance(v, dict) else v for k, v in record.items()})
    return out.getvalue().rstrip("\n")


# Which columns a narrow terminal keeps, most wanted first; the others follow in their order.
PRIORITY = (
    "arm", "context", "budget", "speedup", "tokens_per_second", "acceptance_rate", "gamma", "dataset", "speedup_low",
    "valid", "run_id", "status",
)  # fmt: skip


def as_table(runs: list[Run], width: int | None = None):
    """A rich table; columns in which no run has anything are left out, and those that do not fit into `width`."""
    from rich.table import Table

    cells = rows(runs)
    table = Table(header_style="bold", box=None, pad_edge=False)
    filled = [i for i in range(len(COLUMNS)) if any(row[i] for row in cells)]
    left, keep = width or 10**6, []
    for i in sorted(filled, key=lambda i: PRIORITY.index(COLUMNS[i]) if COLUMNS[i] in PRIORITY else len(PRIORITY) + i):
        left -= max(len(HEADINGS[i]), *(len(row[i]) for row in cells)) + 2
        if left >= 0:
            keep.append(i)
    keep.sort()
    for i in keep:
        table.add_column(HEADINGS[i], justify="left" if FIGURES[COLUMNS[i]].form.left else "right", no_wrap=True)
    for row in cells:
        table.add_row(*(row[i] for i in keep))
    return table


def print_table(runs: list[Run]) -> None:
    """The table on stdout."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 240  # a pipe has no width; do not cut columns
    console.print(as_table(runs, console.width))


def side_by_side(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: an arm a row, a data set and context a column, with speedup, its interval and tokens a second."""
    cells = [r for r in arranged(runs) if r.command == "bench" and r.tokens_per_second is not None]
    columns = list(dict.fromkeys((r.dataset, r.context) for r in cells))
    arms = list(dict.fromkeys((r.arm, r.budget, r.gamma) for r in cells))
    found = {((r.arm, r.budget, r.gamma), (r.dataset, r.context)): r for r in reversed(cells)}

    def show(run: Run | None) -> str:
        if run is None:
            return ""
        if not run.valid:
            return "invalid"
        return f"{run.speedup:.2f}× ({_interval(run)}) {run.tokens_per_second:.1f}"

    head = [
        "arm",
        *(
            f"{dataset} {context // 1024}k" if context % 1024 == 0 else f"{dataset} {context}"
            for dataset, context in columns
        ),
    ]
    return head, [[arm[0], *(show(found.get((arm, column))) for column in columns)] for arm in arms]


def losses(runs: list[Run]) -> list[str]:
    """Where our fastest budgeted drafter is beaten, or does not pay: one line a data set and context."""
    lines = []
    for key in dict.fromkeys((r.dataset, r.context) for r in arranged(runs)):
        here = [r for r in runs if (r.dataset, r.context) == key and r.valid and r.speedup is not None]
        ours = max((r for r in here if r.method == "bd"), key=lambda r: r.speedup, default=None)
        if ours is None:
            continue
        ahead = [r for r in here if r.method != "bd" and r.speedup > ours.speedup]
        for r in sorted(ahead, key=lambda r: -r.speedup):
            sure = "beyond both intervals" if r.speedup_low > ours.speedup_high else "within the intervals"
            lines.append(
                f"{key[0]} at {key[1]}: {r.arm} {r.speedup:.2f}× ahead of {ours.arm} {ours.speedup:.2f}×, {sure}"
            )
    return lines


def brief(runs: list[Run]) -> str:
    """One line on where a sweep stands: the fastest valid arm so far."""
    top = max((r for r in runs if r.valid and r.speedup is not None), key=lambda r: r.speedup, default=None)
    return f"{len(runs)} cells" + (f", best {top.arm} {top.speedup:.2f}× at {top.context}" if top else "")


def curve_rows(evaluations: list[Evaluation]) -> list[list[str]]:
    """Acceptance of each data set, context and budget (rows) at each step (columns), for `bdcli report --run`."""
    steps = sorted({e.step for e in evaluations})
    cells = {(e.dataset, e.context, e.budget, e.step): e for e in evaluations}
    lines = [["dataset", "context", "budget", *(f"step {step}" for step in steps)]]
    for key in dict.fromkeys((e.dataset, e.context, e.budget) for e in evaluations):
        found = [cells.get((*key, step)) for step in steps]
        lines.append(
            [*map(str, key), *(FIGURES["acceptance_rate"].cell(e.acceptance_rate if e else None) for e in found)]
        )
    return lines


def curves(evaluations: list[Evaluation], form: str) -> str:
    """The grid of one distil run as table, markdown, csv or json; csv and json hold every column, unformatted."""
    return _measurements("evaluations", Evaluation, evaluations, curve_rows(evaluations), form)


def held_out(found: list[Loss], form: str) -> str:
    """Held-out losses of one pretrain run, step by step, in the forms of `curves`."""
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
