"""What each part of the method buys, in acceptance, and what it costs, in time and memory.

    python scripts/ablation.py run recipes/pocket_drafter.yaml --on books=FOLDER --on qmsum=FILE.jsonl
    python scripts/ablation.py table runs/ablation
    python scripts/ablation.py cost recipes/pocket_drafter.yaml          # minutes; needs a quiet machine

`run` trains every arm, with every seed, on the same windows for the same number of steps; each arm keeps the best
checkpoint of its own, judged as `bdcli distill` does. Then it measures all of them on the same held-out texts, which
training never looked at: the exact grid context × budget at a fixed γ, without a rollout. A stopped `run` continues
where it was. `cost` runs a few steps of every arm, each in a process of its own.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer
from ablation_arms import ARMS, READINGS
from ablation_tables import as_markdown, cost_markdown

from bdcli.base.console import end_interrupted, note, run_script
from bdcli.base.devices import peak_memory
from bdcli.base.errors import UserError
from bdcli.base.files import read_json, write_file
from bdcli.base.progress import Progress
from bdcli.cache.selection import parse_selection
from bdcli.cli.output import DistillProgress
from bdcli.config.distill import DistillRecipe, Evaluation
from bdcli.config.loader import load_recipe
from bdcli.model.checkpoint import load_model
from bdcli.model.llama import Model
from bdcli.results.store import Store
from bdcli.speculation.sampling import Sampling
from bdcli.train.acceptance import Passage, acceptance_grid
from bdcli.train.distill.checks import missing_inputs
from bdcli.train.distill.material import Material
from bdcli.train.distill.run import Distillation
from bdcli.train.record import Recorder, distill_run
from bdcli.train.trainer import Trainer

DEFAULT_ARMS = "none,full,fixed,paper,ours"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
RecipeArgument = Annotated[Path, typer.Argument(help="The recipe of the arm `ours`.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of it.")]
ArmsOption = Annotated[str, typer.Option(help=f"Of {', '.join(ARMS)}.")]


@app.command()
def run(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Option(help="Folder of the experiment.")] = Path("runs/ablation"),
    arms: ArmsOption = DEFAULT_ARMS,
    seeds: Annotated[str, typer.Option(help="Seeds of data order and views, one run of every arm each.")] = "0,1",
    on: Annotated[
        list[str] | None, typer.Option(help="Text to measure on, NAME=PLACE; [default: evaluation of the recipe]")
    ] = None,
    on_contexts: Annotated[str, typer.Option(help="Prompt lengths there.")] = "4096,8192,16384",
    on_passages: Annotated[int, typer.Option(help="Passages of each context, over all texts.")] = 12,
    on_tokens: Annotated[int, typer.Option(help="Tokens the target writes after each.")] = 256,
    overrides: SetOption = None,
    db: Annotated[str | None, typer.Option(help="Store of the runs.")] = None,
) -> None:
    """Train and measure what is missing, then print the table."""
    base, names = load(recipe, overrides), parse_arms(arms)
    evaluation = base.evaluation
    if on:
        contexts = tuple(int(c) for c in on_contexts.split(","))
        evaluation = replace(
            evaluation, sources=tuple(on), contexts=contexts, passages=on_passages, new_tokens=on_tokens
        )
    plan = [(name, int(seed)) for seed in seeds.split(",") for name in names]
    out.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(base, evaluation, out, Store(db))
    with DistillProgress() as console:
        for number, (name, seed) in enumerate(plan):
            console.advance("arms", number, len(plan), f"{name}, seed {seed}")
            experiment.measure(name, seed, ArmProgress(console, f"{name} {seed}"))
        console.advance("arms", len(plan), len(plan))
    typer.echo(as_markdown(results(out)))


def load(recipe: Path, overrides: list[str] | None) -> DistillRecipe:
    return load_recipe(recipe, DistillRecipe, overrides or [], missing_inputs)


def parse_arms(text: str) -> list[str]:
    """Names of arms. Raises UserError on an unknown one."""
    names = text.split(",")
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise UserError(f"--arms {unknown[0]}: no such arm", f"Arms: {', '.join(ARMS)}")
    return names


class ArmProgress(Progress):
    """Phases of one arm, apart from those of others."""

    def __init__(self, console: Progress, arm: str):
        self._console, self._arm = console, arm

    def note(self, line: str) -> None:
        self._console.note(line)

    def advance(self, phase: str, done: float, total: float, detail: str = "") -> None:
        self._console.advance(f"{self._arm}: {phase}", done, total, detail)

    def measured(self, rows: Sequence, **at: int) -> None:
        self._console.measured(rows, **at)


@dataclass(frozen=True)
class Experiment:
    """All arms of one recipe in the folder `out`, measured by `evaluation`."""

    base: DistillRecipe
    evaluation: Evaluation
    out: Path
    store: Store

    def measure(self, name: str, seed: int, progress: Progress) -> None:
        """Train an arm with one seed and measure it, as far as neither is done."""
        arm, folder = ARMS[name], self.out / f"{name}-{seed}"
        if (folder / "measured.json").exists():
            return
        recipe = replace(self.base, seed=seed)
        recipe = arm.change(recipe) if arm.change else recipe
        recorder = Recorder(self.store, progress)
        job = Distillation(recipe, folder, recorder, data=self.out / f"data-{seed}")
        trained = self._train(job, recorder) if arm.change else None
        models = job.models()
        drafter = models.drafter
        if trained:
            drafter = load_model(Path(trained["checkpoint"]), torch.float32, job.device)
        recipe = replace(recipe, evaluation=self.evaluation)
        passages = Material(recipe, self.out / "measured", models.pair, models.folders, progress).passages()
        readings = {r: list(cells(drafter, passages, recipe, r, progress)) for r in arm.readings}
        found = {"arm": name, "seed": seed, "trained": trained, "readings": readings}
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "measured.json", json.dumps(found))

    def _train(self, job: Distillation, recorder: Recorder) -> dict:
        """What came of training: of an earlier run, or of this one."""
        done = job.out / "trained.json"
        if not done.exists():
            outcome = distill_run(recorder, job, resume=True)
            if outcome["status"] == "interrupted":
                end_interrupted()
            kept = ("checkpoint", "steps", "best_step", "stopped", "skipped", "positions_per_target_token")
            write_file(done, json.dumps({key: outcome[key] for key in (*kept, "tokens_per_second")}))
        return read_json(done)


def cells(
    drafter: Model, passages: list[Passage], recipe: DistillRecipe, reading: str, progress: Progress
) -> Iterator[dict]:
    """Acceptance of every data set, context and budget, the drafter read in one way."""
    e, groups = recipe.evaluation, {(p.dataset, len(p.prompt)) for p in passages}
    selections = [parse_selection(budget, *READINGS[reading], e.gamma) for budget in e.budgets]
    found = acceptance_grid(drafter, passages, selections, e.gamma, Sampling(recipe.temperature))
    for number, cell in enumerate(found, 1):
        progress.advance(f"measure, {reading}", number, len(groups) * len(selections))
        yield asdict(cell)


# -- the table


def results(out: Path) -> list[dict]:
    found = [read_json(path) for path in sorted(out.glob("*/measured.json"))]
    return sorted(found, key=lambda r: (list(ARMS).index(r["arm"]), r["seed"]))


@app.command()
def table(out: Annotated[Path, typer.Argument(help="Folder of the experiment.")] = Path("runs/ablation")) -> None:
    """Print the table of what is measured so far."""
    typer.echo(as_markdown(results(out)))


# -- what it costs


class RandomWindows:
    """Windows without a source: cost does not depend on what is read."""

    def __init__(self, recipe: DistillRecipe, vocab: int):
        self._context, self._vocab = recipe.data.context, vocab

    def __len__(self) -> int:
        return 1000

    def ids(self, window: int) -> torch.Tensor:
        return torch.randint(self._vocab, (self._context,), generator=torch.Generator().manual_seed(window))

    def target(self, _window: int) -> None:
        return None


def cost_of(recipe: DistillRecipe, steps: int) -> dict:
    """Seconds a step (median, after one that does not count), the process's peak memory, supervised positions."""
    with tempfile.TemporaryDirectory() as folder:
        job = Distillation(recipe, Path(folder))
        models = job.models()
        loaded = peak_memory(job.device)
        trainer, seconds = Trainer(models.drafter, recipe.optimizer), []
        batches = job.batches(RandomWindows(recipe, models.pair.target.config.vocab_size))
        for step in range(steps + 1):
            began = time.perf_counter()
            trainer.step(partial(batches.losses, step), 0.1)
            seconds.append(time.perf_counter() - began)
        return {
            "views": len(job.plan().selections),
            "positions": round(job.plan().supervised * recipe.data.context),
            "windows": recipe.optimizer.windows_per_step,
            "context": recipe.data.context,
            "seconds": statistics.median(seconds[1:]),
            "loaded": loaded,
            "peak": peak_memory(job.device),
        }


@app.command()
def cost(
    recipe: RecipeArgument,
    arms: ArmsOption = "paper,one,ours",
    steps: Annotated[int, typer.Option(help="Steps that count, after one that does not.")] = 5,
    overrides: SetOption = None,
) -> None:
    """Supervised positions per target forward, speed and memory of the arms side by side."""
    base = load(recipe, overrides)
    names = [name for name in parse_arms(arms) if ARMS[name].change]
    found = {}
    for name in names:
        note(f"{name}: {steps + 1} steps of {base.optimizer.windows_per_step} × {base.data.context} tokens")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:  # its peak memory is its own
            found[name] = fresh.submit(cost_of, ARMS[name].change(base), steps).result()
    typer.echo(cost_markdown(found))


if __name__ == "__main__":
    run_script(app)
