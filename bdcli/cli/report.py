"""The command `report`: stored runs as tables, text and pictures. It never imports torch."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bdcli.base.console import note
from bdcli.base.errors import UserError
from bdcli.base.streams import write_line
from bdcli.cli.flags import DbOption
from bdcli.cli.output import show_table

if TYPE_CHECKING:
    from bdcli.results.query import Filter
    from bdcli.results.schema import Run
    from bdcli.results.store import Store

Format = StrEnum("Format", ["table", "markdown", "csv", "json"])


def report(
    ctx: Annotated[str | None, typer.Option(help="8k: within 12.5 % of 8192; 8192: exactly that.")] = None,
    budget: Annotated[str | None, typer.Option(help="A budget, or full.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Data set or prompt name.")] = None,
    method: Annotated[str | None, typer.Option(help="bd, full, official, ...")] = None,
    command: Annotated[str | None, typer.Option(help="decode, bench, ...")] = None,
    arm: Annotated[str | None, typer.Option(help="A bench arm by name.")] = None,
    experiment: Annotated[str | None, typer.Option(help="One bench sweep by its key.")] = None,
    best: Annotated[
        bool, typer.Option("--best", help="Of each data set, context, method and budget the fastest valid cell.")
    ] = False,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="Bench arms as rows, data sets and contexts as columns.")
    ] = False,
    status: Annotated[str | None, typer.Option(help="done, failed, interrupted or running.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Newest runs to show; 0 shows all.")] = 0,
    form: Annotated[Format, typer.Option("--format", help="How to print.")] = "table",
    run: Annotated[str | None, typer.Option(help="One distil or pretrain run: what it measured, step by step.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw acceptance and speedup to a .png, .svg or .pdf file.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write tables and pictures as one page that needs no other file.")
    ] = None,
    db: DbOption = None,
) -> None:
    """Show stored runs, or with --run the curves of one."""
    from bdcli.results.query import Filter
    from bdcli.results.store import Store

    keep = Filter(ctx, budget, dataset, method, command, status, arm, experiment)
    store = Store(db, readonly=True)
    if run is not None:
        _show_measurements(store, run, form, plot)
        return
    runs = _select(store, keep, limit, best)
    _draw(runs, plot, html)
    if side_by_side:
        _show_side_by_side(runs)
    elif runs or form != "table":
        _show_runs(runs, form)
    else:
        note(f"no run in {store.name} fits; make one with: bdcli decode PROMPT_FILE")


def _show_measurements(store: Store, run_id: str, form: Format, plot: Path | None) -> None:
    """What one distil or pretrain run measured, step by step; with `plot` also the curves of its acceptance."""
    from bdcli.results.plots import plot_curves
    from bdcli.results.tables import acceptance_table, loss_table

    evaluations, losses = store.evaluations(run_id), store.losses(run_id)
    if losses and plot is None:
        write_line(loss_table(losses, str(form)))
        return
    if not evaluations:
        raise UserError(f"run {run_id} has no acceptance grid", "See bdcli report --command distill")
    if plot is not None:
        plot_curves(evaluations, plot)
        note(f"wrote {plot}")
    write_line(acceptance_table(evaluations, str(form)))


def _select(store: Store, keep: Filter, limit: int, best: bool) -> list[Run]:
    """Runs that pass the filter, the newest `limit` of them; a note says which cells are refused."""
    from bdcli.results.processes import mark_unknown
    from bdcli.results.query import best_cells, check_cells, refusals

    runs = [run for run in store.runs() if keep(run)]
    runs = check_cells(runs[:limit] if limit else runs, store)
    for line in refusals(runs):
        note(line)
    return mark_unknown(best_cells(runs) if best else runs)


def _draw(runs: list[Run], picture: Path | None, page: Path | None) -> None:
    """Write the files that were asked for."""
    if picture is not None:
        from bdcli.results.plots import plot

        plot(runs, picture)
        note(f"wrote {picture}")
    if page is not None:
        from bdcli.results.page import write_page

        write_page(runs, page)
        note(f"wrote {page}")


def _show_side_by_side(runs: list[Run]) -> None:
    from bdcli.results.tables import markdown, side_by_side

    write_line(markdown(*side_by_side(runs)))


def _show_runs(runs: list[Run], form: Format) -> None:
    from bdcli.results.query import arrange
    from bdcli.results.tables import as_csv, as_json, as_markdown

    if form == "table":
        show_table(arrange(runs))
    elif form == "markdown":
        write_line(as_markdown(arrange(runs)))
    else:
        write_line(as_json(runs) if form == "json" else as_csv(runs))
