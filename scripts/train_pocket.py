"""The pocket pair from nothing on a machine with an accelerator, which needs this repository and one archive of text.

    python scripts/train_pocket.py pack books/train more_books.tar.xz --out corpus.tar.xz     # at home, once
    python scripts/train_pocket.py train --corpus corpus.tar.xz --out runs/pocket --minutes 9  # there; again until done
    python scripts/train_pocket.py pieces runs/pocket --out OUT                                # there: files to carry
    python scripts/train_pocket.py join OUT weights                                            # at home

`train` goes through its stages in order, each where it was stopped: the target (recipes/pocket_target.yaml, without its
seed), a start for the drafter (recipes/pocket_start.yaml), that start distilled on short texts
(recipes/pocket_short.yaml), then under all budgets (recipes/pocket_drafter.yaml), and the naive rival, distilled on the
full cache alone instead. The last two measure the grid of acceptance before and after. Python's own sources and recall
texts are made on the spot. `pieces` cuts the models and the grids into files that small transfers take, and `join`
puts them together again and checks them.
"""

from __future__ import annotations

import io
import json
import lzma
import random
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bdcli.base.console import ConsoleProgress, end_interrupted, note, run_script
from bdcli.base.errors import BdcliError, UserError
from bdcli.base.files import digest, write_file
from bdcli.cli.output import DistillProgress, PretrainProgress, show_grids, show_losses
from bdcli.config.distill import DistillRecipe
from bdcli.config.loader import load_recipe
from bdcli.config.pretrain import PretrainRecipe
from bdcli.data.sources import documents
from bdcli.results.store import Store
from bdcli.train.distill import checks
from bdcli.train.distill.run import Distillation
from bdcli.train.pretrain import run as pretraining
from bdcli.train.pretrain.run import Pretraining
from bdcli.train.record import Recorder, distill_run, pretrain_run

RECIPES = Path(__file__).parent.parent / "recipes"
MIB = 2**20
# for text: three bytes of context for the next, none for its alignment, and a window over all of it
FILTERS = [
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 192 * MIB, "lc": 4, "lp": 0, "pb": 0}
]
MANIFEST, RESULT = "pieces.json", "result.json"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


# -- the archive


@app.command()
def pack(
    sources: Annotated[list[str], typer.Argument(help="Folders, files and tars of texts.")],
    out: Annotated[Path, typer.Option(help="The archive.")] = Path("corpus.tar.xz"),
    limit_mib: Annotated[float, typer.Option(help="Its largest size in MiB.")] = 36.0,
) -> None:
    """Repack texts, in random order, as one .tar.xz that stays below a size. Takes minutes."""
    found = {d.name: d.text for source in sources for d in documents(source)}
    names, limit = sorted(found), int(limit_mib * MIB)
    random.Random(0).shuffle(names)
    kept = characters = 0
    with (
        out.open("wb") as raw,
        ConsoleProgress(resumable=True) as progress,
        lzma.LZMAFile(raw, "wb", filters=FILTERS) as packed,
        tarfile.open(fileobj=packed, mode="w|") as archive,
    ):
        for name in names:
            body = found[name].encode("utf-8")
            # what is packed lags behind what was given; text shrinks to less than half
            if raw.tell() + (len(body) + 4 * MIB) // 2 > limit and kept:
                continue
            entry = tarfile.TarInfo(f"{name}.txt")
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
            kept, characters = kept + 1, characters + len(found[name])
            progress.advance("packed", min(raw.tell(), limit), limit, f"{kept} texts")
    size = out.stat().st_size
    if size > limit:
        raise BdcliError(f"{out} has {size / MIB:.1f} MiB, more than {limit_mib:g}", "Lower --limit-mib a little")
    typer.echo(f"{out}: {kept} of {len(names)} texts, {characters / 1e6:.1f} M characters in {size / MIB:.1f} MiB")


# -- the stages


@dataclass(frozen=True)
class Stage:
    """One training run: its command, its recipe, and settings over it."""

    name: str
    command: str
    recipe: Path
    settings: tuple[str, ...]
    data: Path | None = None  # folder of a distil run's windows; its own where none


def stages(corpus: Path, out: Path, extra: dict[str, list[str]]) -> list[Stage]:
    texts = json.dumps([str(corpus), "stdlib", "recall"])
    mix = [f"corpus.sources={texts}", "corpus.weights=[0.72, 0.15, 0.13]", "held_out.sources=[]"]
    target, start = out / "target" / "model", out / "start" / "model"
    windows = [f"target={target}", f"data.sources={texts}"]
    pair = [*windows, f"drafter={out / 'short' / 'drafter'}"]
    target_recipe, start_recipe, short_recipe, drafter_recipe = (
        RECIPES / f"pocket_{name}.yaml" for name in ("target", "start", "short", "drafter")
    )
    tokens = ["schedule.follow=tokens"]
    steps = ["optimizer.follow=steps"]
    made = [
        Stage("target", "pretrain", target_recipe, (*mix, "init=null", *tokens, *extra["target"])),
        Stage("start", "pretrain", start_recipe, (*mix, f"init={target}", *tokens, *extra["start"])),
        Stage("short", "distill", short_recipe, (*windows, f"drafter={start}", *steps, *extra["short"])),
        Stage("drafter", "distill", drafter_recipe, (*pair, *steps, *extra["drafter"]), out / "data"),
    ]
    rival = ("views.mode=full",)
    return [*made, Stage("naive", "distill", drafter_recipe, (*pair, *steps, *extra["drafter"], *rival), out / "data")]


Settings = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Change a setting; may be repeated.")]


@app.command()
def train(
    corpus: Annotated[Path, typer.Option(help="The archive, or any source of text.")],
    out: Annotated[Path, typer.Option(help="Folder of all stages.")] = Path("runs/pocket"),
    minutes: Annotated[float | None, typer.Option(help="Stop in time; the same command continues.")] = None,
    set_target: Settings = None,
    set_start: Settings = None,
    set_short: Settings = None,
    set_drafter: Settings = None,
    db: Annotated[str | None, typer.Option(help="Store of the runs.")] = None,
) -> None:
    """Train what is not trained yet, stage by stage."""
    deadline = time.monotonic() + (float("inf") if minutes is None else 60 * minutes)
    given = {"target": set_target, "start": set_start, "short": set_short, "drafter": set_drafter}
    extra = {stage: settings or [] for stage, settings in given.items()}
    store = Store(db)
    for stage in stages(corpus, out, extra):
        if (out / stage.name / RESULT).exists():
            continue
        if time.monotonic() > deadline or not run_stage(stage, out / stage.name, store, deadline):
            note(f"out of time in the stage {stage.name}; the same command continues")
            raise typer.Exit(3)
    note(f"done; take it home with: python scripts/train_pocket.py pieces {out} --out FOLDER")


def run_stage(stage: Stage, folder: Path, store: Store, deadline: float) -> bool:
    """Run a stage until it is done or out of time; its result is written where it is done."""
    run, show = (_pretrain, show_losses) if stage.command == "pretrain" else (_distill, show_grids)
    result = run(stage, folder, store, deadline)
    if result["status"] == "interrupted":
        end_interrupted()
    show(result)
    if result["stopped"] == "out of time":
        return False
    write_file(folder / RESULT, json.dumps(result, default=str))
    return True


def _pretrain(stage: Stage, folder: Path, store: Store, deadline: float) -> dict:
    settings = load_recipe(stage.recipe, PretrainRecipe, list(stage.settings), pretraining.missing_inputs)
    with PretrainProgress() as console:
        recorder, left = Recorder(store, console), (deadline - time.monotonic()) / 60
        job = Pretraining(settings, folder, recorder, None if left == float("inf") else left)
        return pretrain_run(recorder, job, resume=True)


def _distill(stage: Stage, folder: Path, store: Store, deadline: float) -> dict:
    settings = load_recipe(stage.recipe, DistillRecipe, list(stage.settings), checks.missing_inputs)
    with DistillProgress() as console:
        recorder = Recorder(store, console)
        return distill_run(recorder, Distillation(settings, folder, recorder, deadline, stage.data), resume=True)


# -- bringing it home


def files_to_carry(out: Path) -> Iterator[tuple[str, Path]]:
    """(name in the archive, file) of the models and the results of all stages."""
    for stage, model in (("target", "model"), ("drafter", "drafter"), ("naive", "drafter"), ("start", "model")):
        folder = out / stage
        if not (folder / RESULT).exists():
            raise UserError(f"the stage {stage} of {out} is not done", "Continue with train")
        yield f"{stage}/{RESULT}", folder / RESULT
        for path in sorted((folder / model).iterdir()):
            yield f"{stage}/{path.name}", path


@app.command()
def pieces(
    run: Annotated[Path, typer.Argument(help="Folder of all stages.")],
    out: Annotated[Path, typer.Option(help="Folder for the pieces.")],
    mib: Annotated[float, typer.Option(help="Largest size of a piece in MiB.")] = 16.0,
) -> None:
    """Cut weights and results into files of a bounded size."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for name, path in files_to_carry(run):
            archive.add(path, name)
    body, size = whole.getvalue(), int(mib * MIB)
    out.mkdir(parents=True, exist_ok=True)
    names = [f"weights.{n:03}" for n in range(-(-len(body) // size))]
    for n, name in enumerate(names):
        (out / name).write_bytes(body[n * size : (n + 1) * size])
    manifest = {"pieces": names, "sha256": digest(body)}
    (out / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    typer.echo(f"{len(names)} pieces, {len(body) / MIB:.1f} MiB, in {out}")


@app.command()
def join(
    folder: Annotated[Path, typer.Argument(help="Folder of the pieces.")],
    out: Annotated[Path, typer.Argument(help="New folder for models and results.")],
) -> None:
    """Put the pieces together and check them."""
    if out.exists():
        raise UserError(f"{out} exists", "Give a new folder")
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder} holds no {MANIFEST}", "Give the folder that `pieces` wrote")
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    gone = [name for name in manifest["pieces"] if not (folder / name).exists()]
    if gone:
        raise UserError(f"{folder / gone[0]} is missing", "Fetch all pieces")
    body = b"".join((folder / name).read_bytes() for name in manifest["pieces"])
    if digest(body) != manifest["sha256"]:
        raise UserError(f"the pieces in {folder} are damaged", "Fetch them again")
    with tarfile.open(fileobj=io.BytesIO(body)) as archive:
        archive.extractall(out, filter="data")
    typer.echo(f"{out}: " + ", ".join(sorted(p.name for p in out.iterdir())))


if __name__ == "__main__":
    run_script(app)
