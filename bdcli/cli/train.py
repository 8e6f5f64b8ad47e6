"""Commands that train: options in, text and tables out. Heavy imports wait inside them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from bdcli.base.console import end_interrupted, note, phases, status_line
from bdcli.cli.flags import DbOption, JsonOption
from bdcli.cli.output import show_accounts, show_grids, show_losses

SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")
]
DataOption = Annotated[Path | None, typer.Option(help="Folder that prepare made. [default: data in --out]")]
OutOption = Annotated[Path | None, typer.Option(help="Folder of the run. [default: runs/RECIPE]")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")]
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
    """Train a small language model from nothing, or on from a checkpoint."""
    from bdcli.config.loader import load_recipe
    from bdcli.config.pretrain import PretrainRecipe

    def check(settings: PretrainRecipe):
        from bdcli.train.pretrain.run import missing

        return missing(settings)

    settings = load_recipe(recipe, PretrainRecipe, overrides or [], check)
    folder = out or Path("runs") / recipe.stem
    from bdcli.results.store import Store

    store = None if dry_run else Store(db)
    with status_line("loading torch"):
        from bdcli.train.pretrain.run import Pretraining
        from bdcli.train.record import pretrain_run

    def measured(_step: int, tokens: int, found: list) -> None:
        for m in found:
            gain = m.tail_nll_short - m.tail_nll
            note(f"{tokens} tokens: held-out loss {m.nll:.3f} at {m.context}, long context is worth {gain:+.3f} nat")

    with phases(quiet=as_json) as (progress, _):
        job = Pretraining(settings, folder, progress, measured, max_minutes)
        for line in job.plan():
            note(line)
        if dry_run:
            return
        result = pretrain_run(store, job, resume)
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        show_losses(result)
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
    """Make what a distil run learns from, in shards, and what it is measured on. Goes on where it was stopped."""
    job, store, folder = _distillation(recipe, overrides, out, max_minutes, dry_run, db)
    if dry_run:
        return
    from bdcli.train.record import prepare_run

    with phases(quiet=as_json) as (job.watcher.progress, _):
        result = prepare_run(store, job)
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        show_accounts(result)
    note(f"learn from it with: bdcli distill {recipe} --out {folder}")


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
    job, store, _ = _distillation(recipe, overrides, out, max_minutes, dry_run, db, data)
    if dry_run:
        return
    from bdcli.train.record import distill_run

    with phases(quiet=as_json) as watched:
        if job.ranks.first:
            job.watcher.progress, job.watcher.grid = watched
        result = distill_run(store, job, resume)
    if not job.ranks.first:
        return
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        show_grids(result)
    _end(result)


def _distillation(
    recipe: Path, overrides, out: Path | None, max_minutes: float | None, dry_run: bool, db: str | None,
    data: Path | None = None,
):  # fmt: skip
    """(job, store, folder) of a distil recipe, its plan told; the store is None on a dry run."""
    deadline = time.monotonic() + (60 * max_minutes if max_minutes is not None else float("inf"))
    from bdcli.config.distill import DistillRecipe
    from bdcli.config.loader import load_recipe

    folder = out or Path("runs") / recipe.stem

    def check(settings: DistillRecipe):
        from bdcli.train.distill.checks import missing

        return missing(settings, folder, data or folder / "data")

    settings = load_recipe(recipe, DistillRecipe, overrides or [], check)
    from bdcli.results.store import Store

    store = None if dry_run else Store(db)
    with status_line("loading torch and models"):
        from bdcli.train.distill.run import Distillation, Watcher
    job = Distillation(settings, folder, Watcher(), deadline, data)
    for line in job.plan.lines() if job.ranks.first else ():
        note(line)
    return job, store, folder


def _end(result: dict) -> None:
    if result["status"] == "interrupted":
        end_interrupted("--resume", where=f" after step {result['steps']}")
