"""Read runs from the store, filter them, show them as table, markdown, csv, json or a plot. Never imports torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bdcli.errors import UserError
from bdcli.options import parse_context
from bdcli.store import Evaluation, Run

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

    def __call__(self, run: Run) -> bool:
        if self.ctx is not None and not _context_fits(run.context, self.ctx):
            return False
        named = ("budget", "dataset", "method", "command", "status")
        return all(getattr(self, n) is None or str(getattr(run, n)) == getattr(self, n) for n in named)


def _context_fits(context: int | None, wanted: str) -> bool:
    """`8k` is nominal, within 12.5 %; `8192` is exact."""
    tokens = parse_context(wanted)
    if context is None:
        return False
    return abs(context - tokens) <= NEAR * tokens if wanted.strip().lower().endswith("k") else context == tokens


def _number(digits: int) -> Callable[[object], str]:
    return lambda value: "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _plain(value: object) -> str:
    return "" if value is None else str(value)


def _yes_no(value: bool | None) -> str:
    return {True: "yes", False: "NO", None: ""}[value]


def _short(value: str | None) -> str:
    return "" if value is None else value.rstrip("/").rsplit("/", 1)[-1]


COLUMNS: dict[str, tuple[str, Callable]] = {
    "run": ("run_id", _plain),
    "status": ("status", _plain),
    "method": ("method", _plain),
    "dataset": ("dataset", _short),
    "target": ("target", _short),
    "dtype": ("dtype", _plain),
    "ctx": ("context", _plain),
    "budget": ("budget", _plain),
    "select": ("select", _plain),
    "γ": ("gamma", _plain),
    "new": ("new_tokens", _plain),
    "acceptance": ("acceptance_rate", _percent),
    "outside loops": ("acceptance_rate_no_loops", _percent),
    "mean length": ("mean_accepted_length", _number(2)),
    "AR tok/s": ("ar_tokens_per_second", _number(1)),
    "tok/s": ("tokens_per_second", _number(1)),
    "speedup": ("speedup", lambda value: "" if value is None else f"{value:.2f}×"),
    "entries": ("max_drafter_entries", _plain),
    "loops": ("loop_rate", _percent),
    "equal": ("output_equal", _yes_no),
}


def rows(runs: list[Run]) -> list[list[str]]:
    """Cells of `COLUMNS` for each run."""
    return [[show(getattr(run, field)) for field, show in COLUMNS.values()] for run in runs]


def as_json(runs: list[Run]) -> str:
    return json.dumps({"runs": [run.model_dump(mode="json") for run in runs]}, indent=2, ensure_ascii=False)


def as_csv(runs: list[Run]) -> str:
    """Every column of the store, unformatted."""
    return _csv(list(Run.model_fields), [run.model_dump(mode="json") for run in runs])


def as_markdown(runs: list[Run]) -> str:
    return _markdown(list(COLUMNS), rows(runs))


def _csv(names: list[str], records: list[dict]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({k: json.dumps(v) if isinstance(v, dict) else v for k, v in record.items()})
    return out.getvalue().rstrip("\n")


def _markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_table(runs: list[Run]):
    """A rich table; columns in which no run has anything are left out."""
    from rich.table import Table

    cells = rows(runs)
    table = Table(header_style="bold", box=None, pad_edge=False)
    keep = [i for i in range(len(COLUMNS)) if any(row[i] for row in cells)]
    for i in keep:
        name = list(COLUMNS)[i]
        table.add_column(name, justify="left" if i < 6 else "right", no_wrap=name in ("run", "ctx", "speedup"))
    for row in cells:
        table.add_row(*(row[i] for i in keep))
    return table


PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito 2008
MARKERS = "osD^vPX"


def curve_rows(evaluations: list[Evaluation]) -> list[list[str]]:
    """Acceptance of each data set, context and budget (rows) at each step (columns), for `bdcli report --run`."""
    steps = sorted({e.step for e in evaluations})
    cells = {(e.dataset, e.context, e.budget, e.step): e for e in evaluations}
    lines = [["dataset", "context", "budget", *(f"step {step}" for step in steps)]]
    for key in dict.fromkeys((e.dataset, e.context, e.budget) for e in evaluations):
        found = [cells.get((*key, step)) for step in steps]
        lines.append([*map(str, key), *(_percent(e.acceptance_rate if e else None) for e in found)])
    return lines


def curves(evaluations: list[Evaluation], form: str) -> str:
    """The grid of one run as table, markdown, csv or json; csv and json hold every column, unformatted."""
    raw = [e.model_dump(mode="json") for e in evaluations]
    if form == "json":
        return json.dumps({"evaluations": raw}, indent=2, ensure_ascii=False)
    if form == "csv":
        return _csv(list(Evaluation.model_fields), raw)
    head, *body = curve_rows(evaluations)
    if form == "markdown":
        return _markdown(head, body)
    widths = [max(map(len, column)) for column in zip(head, *body)]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths)) for row in (head, *body))


def plot_curves(evaluations: list[Evaluation], path: Path) -> None:
    """Acceptance against training step, one panel a context, one line a budget, with 95 % intervals."""
    pyplot = _pyplot(path)
    groups = list(dict.fromkeys((e.dataset, e.context) for e in evaluations))
    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(4.6 * len(groups), 3.6), layout="constrained", sharey=True, squeeze=False
    )
    for axis, (dataset, context) in zip(axes[0], groups):
        here = [e for e in evaluations if (e.dataset, e.context) == (dataset, context)]
        for i, budget in enumerate(dict.fromkeys(e.budget for e in here)):
            line = [e for e in here if e.budget == budget and e.acceptance_rate is not None]
            style = {"color": PALETTE[i % 7], "marker": MARKERS[i % 7]}
            steps = [e.step for e in line]
            axis.plot(steps, [100 * e.acceptance_rate for e in line], label=f"budget {budget}", **style)
            if all(e.low is not None for e in line):
                low, high = ([100 * getattr(e, end) for e in line] for end in ("low", "high"))
                axis.fill_between(steps, low, high, color=PALETTE[i % 7], alpha=0.1, linewidth=0)
        axis.set(title=f"{dataset}, {_k(context)} context", xlabel="training step", ylim=(0, 100))
        _tidy(axis)
    axes[0][0].set_ylabel("acceptance rate (%)")
    axes[0][0].legend(frameon=False, fontsize=8)
    _write_figure(pyplot, figure, path)


def plot(runs: list[Run], path: Path) -> None:
    """Acceptance against budget and speedup against context, as medians, to a .png, .svg or .pdf file.

    Only runs that may be compared with the newest one are drawn: same pair, machine, dtype and sampling.
    """
    pyplot = _pyplot(path)
    done = [r for r in runs if r.status == "done" and r.acceptance_rate is not None and r.budget is not None]
    if not done:
        raise UserError("no finished run with acceptance fits the filters", "Run bdcli decode first")
    done = [r for r in done if _comparable(r) == _comparable(done[0])]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    budgets = sorted({r.budget for r in done}, key=_budget_order)
    contexts = sorted({_nominal(r.context) for r in done})
    for i, context in enumerate(contexts):
        style = {"color": PALETTE[i % 7], "marker": MARKERS[i % 7]}
        at = [(j, _median(done, context, b, "acceptance_rate")) for j, b in enumerate(budgets)]
        left.plot(*zip(*[(x, 100 * y) for x, y in at if y is not None]), label=f"{_k(context)} context", **style)
    for i, budget in enumerate(budgets):
        style = {"color": PALETTE[i % 7], "marker": MARKERS[i % 7]}
        at = [(c, _median(done, c, budget, "speedup")) for c in contexts]
        points = [(c, y) for c, y in at if y is not None]
        if points:
            right.plot(*zip(*points), label=f"budget {budget}", **style)
    left.set(xlabel="drafter KV budget (entries per layer and head)", ylabel="acceptance rate (%)", ylim=(0, 100))
    left.set_xticks(range(len(budgets)), [str(b) for b in budgets])
    right.set_xscale("log", base=2)
    right.set_xticks(contexts, [_k(c) for c in contexts])
    right.minorticks_off()
    right.axhline(1, color="0.6", linewidth=1)
    right.set(xlabel="context (prompt tokens)", ylabel="speedup over AR (×)")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        _tidy(axis)
        axis.legend(frameon=False, fontsize=8)
    _write_figure(pyplot, figure, path)


def _pyplot(path: Path):
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {path}: unknown picture format", "Use a name that ends in .png, .svg or .pdf")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _tidy(axis) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _write_figure(pyplot, figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"--plot {path}: {error.strerror}", "Give a path in an existing folder") from None
    finally:
        pyplot.close(figure)


def _comparable(run: Run) -> tuple:
    return run.target, run.drafter, run.machine, run.device, run.dtype, run.temperature, run.select == "official"


def _budget_order(budget: int | str) -> float:
    return float("inf") if budget == "full" else float(budget)


def _nominal(context: int) -> int:
    """The nearest power of two when the context is within 12.5 % of it, else the context itself."""
    power = 1 << max(0, round(context - 1).bit_length() - 1)
    near = min((power, 2 * power), key=lambda c: abs(c - context))
    return near if abs(near - context) <= NEAR * near else context


def _k(context: int) -> str:
    return f"{context // 1024}k" if context % 1024 == 0 else str(context)


def _median(runs: list[Run], context: int, budget: int | str, field: str) -> float | None:
    from statistics import median

    values = [getattr(r, field) for r in runs if _nominal(r.context) == context and r.budget == budget]
    values = [v for v in values if v is not None]
    return median(values) if values else None
