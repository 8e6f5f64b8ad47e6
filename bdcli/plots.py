"""Pictures of stored runs: curves of a distil run, and how acceptance and speed go with budget, context and memory."""

from __future__ import annotations

from pathlib import Path

from bdcli.errors import UserError
from bdcli.report import NEAR
from bdcli.store import Evaluation, Run

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito 2008
MARKERS = "osD^vPX"


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
