"""Pictures of stored runs: curves of a distil run, and how acceptance and speed go with budget, context and memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import median

from bdcli.base.errors import UserError
from bdcli.config.bench import PEER_METHODS
from bdcli.results.cells import best
from bdcli.results.query import CONTEXT_TOLERANCE
from bdcli.results.schema import Evaluation, Run

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


FAMILIES = {  # label, colour, marker; the same in every panel
    "bd": ("BudgetDraft", PALETTE[0], "o"),
    "naive": ("undistilled drafter", PALETTE[1], "s"),
    "official": ("official selection", PALETTE[2], "D"),
    "full": ("full-cache drafter", PALETTE[5], "^"),
    "lookup": ("prompt lookup", PALETTE[4], "v"),
    "ar": ("AR", "black", "*"),
    "hf-ar": ("transformers AR", PALETTE[6], "x"),
    "hf-static": ("transformers AR, static cache", PALETTE[6], "+"),
    "hf-assisted": ("transformers assisted", PALETTE[3], "P"),
    "hf-lookup": ("transformers lookup", "0.55", "X"),
    "llama-cpp": ("llama.cpp", PALETTE[1], "1"),
    "llama-cpp-ngram": ("llama.cpp n-gram", PALETTE[1], "2"),
    "vllm": ("vLLM", PALETTE[2], "3"),
    "openvino": ("OpenVINO fp16", PALETTE[4], "4"),
    "openvino-sdpa": ("OpenVINO fp16, SDPA", PALETTE[4], "|"),
    "openvino-int8": ("OpenVINO int8", PALETTE[5], "4"),
    "openvino-int4": ("OpenVINO int4", PALETTE[5], "|"),
}
STYLES = ("-", "--", "-.", ":")  # budgets of one family


def family(run: Run) -> str:
    """What a run is drawn as."""
    arm = run.config.get("arm", {})
    if isinstance(arm, dict) and (arm.get("drafter") == "naive" or run.method in ("window", "chunk")):
        return "naive"
    return "full" if run.budget == "full" else run.method or "bd"


def plot(runs: list[Run], path: Path) -> None:
    """Acceptance against budget and context, speedup against context, speed against memory, to .png, .svg or .pdf.

    One row of panels a data set, medians where a cell was measured more than once. Only runs that may be compared with
    the newest one are drawn: same sweep, or same pair, machine, dtype and sampling.
    """
    pyplot = _pyplot(path)
    done = [r for r in runs if r.status == "done" and r.speedup is not None and r.valid is not False]
    if not done:
        raise UserError("no finished run with a speedup fits the filters", "Run bdcli bench or bdcli decode first")
    done = _fastest_dtype([r for r in done if _comparable(r) == _comparable(done[0])])
    datasets = sorted({r.dataset for r in done}) if done[0].experiment else [None]
    shape = (2, 2) if len(datasets) == 1 else (len(datasets), 4)
    size = 4.9 * shape[1], 4.3 * shape[0]
    figure, axes = pyplot.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    for row, dataset in zip(axes.reshape(-1, 4), datasets):
        here = [r for r in done if dataset in (None, r.dataset)]
        for axis, draw in zip(row, (_by_budget, _by_context, _speedups, _memory)):
            draw(axis, here)
            _tidy(axis)
            if len(datasets) > 1:
                axis.set_title(f"{dataset}: {axis.get_title()}", fontsize=10)
    _write_figure(pyplot, figure, path)


def _by_budget(axis, runs: list[Run]) -> None:
    """A line a context, solid for the drafter, dashed for the undistilled one."""
    runs, gamma = _one_gamma([r for r in runs if r.budget is not None and family(r) in ("bd", "full", "naive")])
    budgets = sorted({r.budget for r in runs}, key=_budget_order)
    contexts = sorted({_nominal(r.context) for r in runs})
    for i, context in enumerate(contexts):
        for naive in (False, True):
            here = [r for r in runs if _nominal(r.context) == context and (family(r) == "naive") is naive]
            points = [(x, [r for r in here if r.budget == b]) for x, b in enumerate(budgets)]
            label = f"{_k(context)} context" + (", undistilled" if naive else "")
            style = {"color": PALETTE[i % 7], "marker": MARKERS[i % 7], "linestyle": "--" if naive else "-"}
            _line(
                axis, points, "acceptance_rate", 100, label, {**style, "markerfacecolor": "white"} if naive else style
            )
    axis.set_xticks(range(len(budgets)), [str(b) for b in budgets])
    axis.set(xlabel="drafter KV budget (entries per layer and head)", ylabel=f"acceptance rate (%), γ = {gamma}")
    axis.set_title("Acceptance against budget", fontsize=10)
    axis.set_ylim(0, min(100.0, axis.get_ylim()[1]))
    _legend(axis)


def _by_context(axis, runs: list[Run]) -> None:
    """A line a family and budget."""
    runs, gamma = _one_gamma([r for r in runs if r.drafted])
    _context_axis(axis, runs)
    for name in FAMILIES:
        mine = [r for r in runs if (family(r) if family(r) != "full" else "bd") == name]
        for i, budget in enumerate(sorted({r.budget for r in mine}, key=_budget_order)):
            label, colour, marker = FAMILIES[name]
            style = {"color": colour, "marker": marker, "linestyle": STYLES[i % 4]}
            points = _at_contexts([r for r in mine if r.budget == budget])
            _line(axis, points, "acceptance_rate", 100, f"{label} {budget or ''}".strip(), style)
    axis.set_ylabel(f"acceptance rate (%), γ = {gamma}")
    axis.set_title("Acceptance against context", fontsize=10)
    axis.set_ylim(0, min(100.0, axis.get_ylim()[1]))
    _legend(axis)


def _speedups(axis, runs: list[Run]) -> None:
    """A line a family: at each context its fastest arm."""
    _context_axis(axis, runs)
    for name, (label, colour, marker) in FAMILIES.items():
        if name == "ar":
            continue
        style = {"color": colour, "marker": marker, "linestyle": "--" if name in PEER_METHODS else "-"}
        points = []
        for context, here in _at_contexts([r for r in runs if family(r) == name]):
            arms = {(r.budget, r.gamma, r.select): [] for r in here}
            for r in here:
                arms[r.budget, r.gamma, r.select].append(r)
            points.append((context, max(arms.values(), key=lambda rows: _median(rows, "speedup") or 0.0)))
        _line(axis, points, "speedup", 1, label, style)
    axis.axhline(1, color="0.35", linewidth=1)
    axis.set_ylabel("speedup over AR (×)")
    axis.set_title("Speedup against context, fastest arm of each kind", fontsize=10)
    axis.set_ylim(bottom=0)
    _legend(axis)


def _memory(axis, runs: list[Run]) -> None:
    """Every arm at the longest context; the numbers are budgets."""
    longest = max(_nominal(r.context) for r in runs)
    here = [r for r in runs if _nominal(r.context) == longest and r.peak_memory_bytes and r.tokens_per_second]
    for name, (label, colour, marker) in FAMILIES.items():
        mine = [r for r in here if family(r) == name]
        if mine:
            places = [(r.peak_memory_bytes / 1e6, r.tokens_per_second) for r in mine]
            axis.plot(*zip(*places), linestyle="", color=colour, marker=marker, label=label, markersize=6)
        for r in mine if name == "bd" else []:
            if r.gamma == "auto" or not any(o.budget == r.budget and o.gamma == "auto" for o in mine):
                place = (r.peak_memory_bytes / 1e6, r.tokens_per_second)
                axis.annotate(str(r.budget), place, (6, -2), textcoords="offset points", fontsize=6.5, color=colour)
    axis.set(xlabel="peak memory: weights, KV caches, work (MB)", ylabel="decode speed (tokens/s)")
    axis.set_title(f"Speed against memory at {_k(longest)}", fontsize=10)
    axis.set_ylim(bottom=0)
    axis.margins(x=0.12)
    _legend(axis)


def _one_gamma(runs: list[Run]) -> tuple[list[Run], int | str]:
    """The runs with the draft length that most of them have, a fixed one if there is any: rates compare at one γ."""
    fixed = Counter(r.gamma for r in runs if r.gamma not in ("auto", 0, None))
    gamma = fixed.most_common(1)[0][0] if fixed else "auto"
    return [r for r in runs if r.gamma == gamma], gamma


def _at_contexts(runs: list[Run]) -> list[tuple[int, list[Run]]]:
    contexts = sorted({_nominal(r.context) for r in runs})
    return [(c, [r for r in runs if _nominal(r.context) == c]) for c in contexts]


def _line(axis, points: list[tuple[float, list[Run]]], field: str, factor: float, label: str, style: dict) -> None:
    """Medians at each x, with the cells' own 95 % intervals where there are any, drawn thin and a little apart."""
    points = [(x, rows) for x, rows in points if _median(rows, field) is not None]
    if not points:
        return
    xs, ys = zip(*[(x, factor * _median(rows, field)) for x, rows in points])
    axis.plot(xs, ys, label=label, markersize=5, linewidth=1.4, **style)
    ends = [[_median(rows, f"{field.removesuffix('_rate')}_{end}") for _, rows in points] for end in ("low", "high")]
    if None not in (*ends[0], *ends[1]):
        spread = [[abs(y - factor * e) for y, e in zip(ys, end)] for end in ends]
        aside = (len(axis.containers) - 3) * (0.02 if axis.get_xscale() == "linear" else 0.008)
        moved = [x + aside if axis.get_xscale() == "linear" else x * 2 ** (2 * aside) for x in xs]
        axis.errorbar(moved, ys, yerr=spread, fmt="none", ecolor=style["color"], alpha=0.4, capsize=2, linewidth=0.9)


def _context_axis(axis, runs: list[Run]) -> None:
    contexts = sorted({_nominal(r.context) for r in runs})
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [_k(c) for c in contexts])
    axis.minorticks_off()
    axis.set_xlabel("context (prompt tokens)")


def _legend(axis) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(
            frameon=False,
            fontsize=7.5,
            ncols=3,
            handlelength=2.6,
            columnspacing=1.2,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.17),
        )


def _pyplot(path: Path):
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {path}: unknown picture format", "Use a name that ends in .png, .svg or .pdf")
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "bdcli"
    from matplotlib import pyplot

    return pyplot


def _tidy(axis) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _write_figure(pyplot, figure, path: Path) -> None:
    try:
        # the same runs give the same file
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise UserError(f"--plot {path}: {error.strerror}", "Give a path in an existing folder") from None
    finally:
        pyplot.close(figure)


def _comparable(run: Run) -> tuple:
    if run.experiment:
        return (run.experiment,)
    return run.target, run.drafter, run.machine, run.device, run.dtype, run.temperature, run.select == "official"


def _fastest_dtype(runs: list[Run]) -> list[Run]:
    """Without a peer's slower dtypes in a sweep that has several."""
    peers = [r for r in runs if r.method in PEER_METHODS]
    kept = {r.run_id for r in best(peers, lambda r: (r.dataset, r.context, r.method, r.gamma, r.drafter))}
    return [r for r in runs if r.method not in PEER_METHODS or r.run_id in kept]


def _budget_order(budget: int | str | None) -> float:
    return float("inf") if budget == "full" else float(budget or 0)


def _nominal(context: int) -> int:
    """The nearest power of two when the context is within 12.5 % of it, else the context itself."""
    power = 1 << max(0, round(context - 1).bit_length() - 1)
    near = min((power, 2 * power), key=lambda c: abs(c - context))
    return near if abs(near - context) <= CONTEXT_TOLERANCE * near else context


def _k(context: int) -> str:
    return f"{context // 1024}k" if context % 1024 == 0 else str(context)


def _median(runs: list[Run], field: str) -> float | None:
    values = [v for r in runs if (v := getattr(r, field)) is not None]
    return median(values) if values else None
