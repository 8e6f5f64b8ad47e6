"""Which runs to show and in which order, and what may be believed of them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from bdcli.config.decode import parse_context
from bdcli.results.cells import best
from bdcli.results.figures import figures_of
from bdcli.results.gates import join_objections, seal_objections
from bdcli.results.schema import Run
from bdcli.results.store import Store

CONTEXT_TOLERANCE = 0.125  # `--ctx 8k` keeps contexts within this share of 8192


@dataclass(frozen=True)
class Filter:
    """Keeps runs that fit every given field; text is compared exactly. Raises UserError for a `ctx` that is no size."""

    ctx: str | None = None
    budget: str | None = None
    dataset: str | None = None
    method: str | None = None
    command: str | None = None
    status: str | None = None
    arm: str | None = None
    experiment: str | None = None

    def __post_init__(self) -> None:
        if self.ctx is not None:
            parse_context(self.ctx)

    def __call__(self, run: Run) -> bool:
        if self.ctx is not None and not _context_fits(run.context, self.ctx):
            return False
        wanted = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "ctx"}
        return all(value is None or str(getattr(run, name)) == value for name, value in wanted.items())


def _context_fits(context: int | None, wanted: str) -> bool:
    """`8k` is nominal, within 12.5 %; `8192` is exact."""
    tokens = parse_context(wanted)
    if context is None:
        return False
    if wanted.strip().lower().endswith("k"):
        return abs(context - tokens) <= CONTEXT_TOLERANCE * tokens
    return context == tokens


def check_cells(runs: list[Run], store: Store) -> list[Run]:
    """The runs, with bench cells compared with their baseline and their seal; a cell that fails loses its speedup.

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


def refusals(runs: list[Run]) -> list[str]:
    """A line for every cell that is shown but may not be believed."""
    bad = [run for run in runs if run.valid is False]
    return [f"refused: {r.dataset} {r.context} {r.arm} ({r.run_id}): {r.invalid_reason}" for r in bad]


def arrange(runs: list[Run]) -> list[Run]:
    """Newest first, but the cells of one sweep together, by data set, context and the order of its arms."""
    place: dict[str, int] = {}
    for i, run in enumerate(runs):
        place.setdefault(run.experiment or run.run_id, i)

    def key(run: Run) -> tuple:
        if not run.experiment:
            return (place[run.run_id],)
        return place[run.experiment], run.dataset or "", run.context or 0, run.started_at

    return sorted(runs, key=key)


def best_cells(runs: list[Run]) -> list[Run]:
    """Of each data set, context, method and budget the fastest valid cell."""
    return best(runs, lambda r: (r.experiment, r.dataset, r.context, r.method, r.budget, r.drafter))


def faster_rivals(runs: list[Run]) -> list[str]:
    """Where our fastest budgeted drafter is beaten, or does not pay: one line a data set and context."""
    lines = []
    for key in dict.fromkeys((r.dataset, r.context) for r in arrange(runs)):
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
