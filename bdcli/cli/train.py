"""Commands that train: options in, text and tables out. Heavy imports wait inside them."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bdcli.base.console import end_interrupted, note, status_line
from bdcli.base.streams import write_json
from bdcli.cli.flags import DbOption, JsonOption
from bdcli.cli.output import DistillProgress, PretrainProgress, show_accounts, show_grids, show_losses, shown_first

if TYPE_CHECKING:
    from bdcli.base.progress import Progress
    from bdcli.results.store import Store
    from bdcli.train.distill.run import Distillation
    from bdcli.train.record import Recorder

SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")
]
DataOption = Annotated[Path | None, typer.Option(help="Folder that prepare made. [default: data in --out]")]
OutOption = Annotated[Path | None, typer.Option(help="Folder of the run. [default: runs/RECIPE]")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]


def pretrain(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="YAML file, for example recipes/pocket_target.yaml.")
    ],
    overrides: SetOption = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    max_minutes: Annotated[float | None, typer.Option(min=0.0, help="Stop in time, last measurement included.")] = None,
    dry_run: DryRunOption = False,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a small language model from random weights, or from a checkpoint."""
    from bdcli.config.loader import load_recipe
    from bdcli.config.pretrain import PretrainRecipe

    def check(settings: PretrainRecipe):
        from bdcli.train.pretrain.run import missing_inputs

        return missing_inputs(settings)

    settings = load_recipe(recipe, PretrainRecipe, overrides or [], check)
    store = _open_store(db, dry_run)
    with status_line("loading torch"):
        from bdcli.train.pretrain.run import Pretraining
        from bdcli.train.record import Recorder, pretrain_run
    console = PretrainProgress()
    recorder = Recorder(store, console)
    job = Pretraining(settings, out or Path("runs") / recipe.stem, recorder, max_minutes)
    for line in job.plan():
        note(line)
    if dry_run:
        return
    show = write_json if as_json else show_losses
    with shown_first(show), console:
        result = pretrain_run(recorder, job, resume)
    show(result)
    _end(result)


def prepare(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A distil recipe.")],
    overrides: SetOption = None,
    out: OutOption = None,
    max_minutes: Annotated[float | None, typer.Option(min=0.0, help="Stop in time with what was made.")] = None,
    dry_run: DryRunOption = False,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make what a distil run learns from, in shards, and what it is measured on. Continues where it was stopped."""
    console = DistillProgress(quiet=as_json)
    job, recorder = _distillation(recipe, overrides, out, None, max_minutes, db, dry_run, console)
    if dry_run:
        return
    from bdcli.train.record import prepare_run

    show = write_json if as_json else show_accounts
    with shown_first(show), console:
        result = prepare_run(recorder, job)
    show(result)
    note(f"learn from it with: bdcli distill {recipe} --out {job.out}")


def distill(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file, for example recipes/llama_4k.yaml.")],
    overrides: SetOption = None,
    out: OutOption = None,
    data: DataOption = None,
    resume: ResumeOption = False,
    max_minutes: Annotated[float | None, typer.Option(min=0.0, help="Stop in time, final grid included.")] = None,
    dry_run: DryRunOption = False,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train one drafter whose acceptance holds under any KV budget."""
    console = DistillProgress(quiet=as_json)
    job, recorder = _distillation(recipe, overrides, out, data, max_minutes, db, dry_run, console)
    if dry_run:
        return
    from bdcli.train.record import distill_run

    show = write_json if as_json else show_grids
    with shown_first(show), console:
        result = distill_run(recorder, job, resume)
    if job.ranks.first:
        show(result)
        _end(result)


def _distillation(
    recipe: Path,
    overrides: list[str] | None,
    out: Path | None,
    data: Path | None,
    max_minutes: float | None,
    db: str | None,
    dry_run: bool,
    console: Progress,
) -> tuple[Distillation, Recorder]:
    """The run of a distil recipe, its plan printed, and what it reports to."""
    deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
    from bdcli.config.distill import DistillRecipe
    from bdcli.config.loader import load_recipe

    folder = out or Path("runs") / recipe.stem

    def check(settings: DistillRecipe):
        from bdcli.train.distill.checks import missing_inputs

        return missing_inputs(settings, folder, data or folder / "data")

    settings = load_recipe(recipe, DistillRecipe, overrides or [], check)
    store = _open_store(db, dry_run)
    with status_line("loading torch"):
        from bdcli.train.distill.run import Distillation
        from bdcli.train.record import Recorder
    recorder = Recorder(store, console)
    job = Distillation(settings, folder, recorder, deadline, data)
    for line in job.plan().lines() if job.ranks.first else ():
        note(line)
    return job, recorder


def _open_store(db: str | None, dry_run: bool) -> Store | None:
    """Opening the store may write it, so a dry run has none."""
    from bdcli.results.store import Store

    return None if dry_run else Store(db)


def _end(result: dict) -> None:
    """Exit as an interrupted run does, where it was."""
    if result["status"] == "interrupted":
        end_interrupted("--resume", where=f" after step {result['steps']}")
