"""What each part of the method buys, in acceptance, and what it costs, in time and memory.

    python scripts/ablation.py run recipes/pocket_drafter.yaml --on books=FOLDER --on qmsum=FILE.jsonl
    python scripts/ablation.py table runs/ablation
    python scripts/ablation.py cost recipes/pocket_drafter.yaml          # minutes; needs a quiet machine

`run` trains every arm, with every seed, on the same windows for the same number of steps; each arm keeps the best
checkpoint of its own, judged as `bdcli distill` does. Then it measures all of them on the same held-out texts, which
training never looked at: the exact grid context × budget at a fixed γ, without a rollout. It goes on where it was
stopped. `cost` runs a few steps of every arm, each in a process of its own.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer

from bdcli.base.console import end_interrupted, note, phases, run_script
from bdcli.base.errors import UserError
from bdcli.base.files import read_json, write_file
from bdcli.config.distill import DistillRecipe, Loss, Views
from bdcli.config.loader import load_recipe
from bdcli.decode.session import peak_memory
from bdcli.model.checkpoint import load_model
from bdcli.results.store import Store
from bdcli.speculation.sampling import Sampling
from bdcli.train.acceptance import Passage, acceptance_grid
from bdcli.train.distill.checks import missing
from bdcli.train.distill.material import Material
from bdcli.train.distill.run import Distillation, Watcher
from bdcli.train.record import distill_run
from bdcli.train.trainer import Trainer

PAPER_BUDGETS = {256: 0.4, 512: 0.3, 1024: 0.2, 2048: 0.1}
FIXED = 1024
READINGS = {"window": ("window", "rebased"), "official": ("official", "absolute")}  # selection and positions in decode


@dataclass(frozen=True)
class Arm:
    """A way to train: what it makes of the recipe, None where nothing is trained; and how its drafter is read."""

    meaning: str
    change: Callable[[DistillRecipe], DistillRecipe] | None
    readings: tuple[str, ...] = ("window",)


def _below(recipe: DistillRecipe, *budgets: int) -> tuple[int, ...]:
    return tuple(b for b in budgets if b < recipe.data.context) or recipe.views.budgets


def _fixed(r: DistillRecipe) -> DistillRecipe:
    return replace(r, views=replace(r.views, mode="sampled", budgets=_below(r, FIXED)[:1], weights=()))


def _paper(r: DistillRecipe) -> DistillRecipe:
    """Its views, selection and loss; learning rate, steps and texts are those of all arms."""
    budgets, taught = _below(r, *PAPER_BUDGETS), min(256, r.data.context // 4)
    views = Views(
        mode="sampled",
        budgets=budgets,
        weights=tuple(PAPER_BUDGETS.get(b, 1.0) for b in budgets),
        positions="absolute",
        select="official",
        anchors=(r.data.context - taught,),
        anchor_tokens=taught,
        teach="anchored",
    )
    return replace(r, views=views, loss=Loss(kind="ce", sparse_weight=0.5))


ARMS = {
    "none": Arm("no distillation", None),
    "full": Arm("full cache only", lambda r: replace(r, views=replace(r.views, mode="full"))),
    "fixed": Arm(f"one fixed budget ({FIXED})", _fixed),
    "paper": Arm("the paper's recipe", _paper, ("official", "window")),
    "one": Arm("one sampled view", lambda r: replace(r, views=replace(r.views, mode="sampled", weights=()))),
    "ours": Arm("ours", lambda r: r),
}
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
    base, names = load(recipe, overrides), chosen(arms)
    evaluation = base.evaluation
    if on:
        contexts = tuple(int(c) for c in on_contexts.split(","))
        evaluation = replace(
            evaluation, sources=tuple(on), contexts=contexts, passages=on_passages, new_tokens=on_tokens
        )
    plan = [(name, int(seed)) for seed in seeds.split(",") for name in names]
    out.mkdir(parents=True, exist_ok=True)
    store = Store(db)
    with phases(quiet=False) as (progress, grid):
        for number, (name, seed) in enumerate(plan):
            progress("arms", number, len(plan), f"{name}, seed {seed}")
            label = f"{name} {seed}: "

            def tell(phase: str, done: int, total: int, said: str, label: str = label) -> None:
                progress(label + phase, done, total, said)

            one_arm(replace(base, seed=seed), name, evaluation, out, store, Watcher(tell, grid))
        progress("arms", len(plan), len(plan), "")
    typer.echo(as_markdown(results(out)))


def load(recipe: Path, overrides: list[str] | None) -> DistillRecipe:
    return load_recipe(recipe, DistillRecipe, overrides or [], missing)


def chosen(arms: str) -> list[str]:
    names = arms.split(",")
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise UserError(f"--arms {unknown[0]}: no such arm", f"Arms: {', '.join(ARMS)}")
    return names


def one_arm(recipe: DistillRecipe, name: str, evaluation, out: Path, store: Store, watcher: Watcher) -> None:
    """Train an arm with one seed and measure it, as far as neither is done."""
    folder, arm = out / f"{name}-{recipe.seed}", ARMS[name]
    done = folder / "measured.json"
    if done.exists():
        return
    changed = arm.change(recipe) if arm.change else recipe
    job = Distillation(changed, folder, watcher, data=out / f"data-{recipe.seed}")
    trained, told = None, folder / "trained.json"
    if arm.change and not told.exists():
        ended = distill_run(store, job, resume=True)
        if ended["status"] == "interrupted":
            end_interrupted()
        kept = ("checkpoint", "steps", "best_step", "stopped", "skipped", "positions_per_target_token")
        write_file(told, json.dumps({key: ended[key] for key in (*kept, "tokens_per_second")}))
    drafter = job.drafter
    if arm.change:
        trained = read_json(told)
        drafter = load_model(Path(trained["checkpoint"]), torch.float32, job.device)
    judged = replace(changed, evaluation=evaluation)
    passages = Material(judged, out / "measured", job.pair, job.folders, watcher.progress).passages()
    found = {
        "arm": name,
        "seed": recipe.seed,
        "trained": trained,
        "readings": {
            reading: list(cells(drafter, passages, judged, reading, watcher.progress)) for reading in arm.readings
        },
    }
    write_file(done, json.dumps(found))


def cells(drafter, passages: list[Passage], recipe: DistillRecipe, reading: str, progress) -> Iterator[dict]:
    """Acceptance of every data set, context and budget, the drafter read in one way."""
    e, keys = recipe.evaluation, {(p.dataset, len(p.prompt)) for p in passages}
    found = acceptance_grid(drafter, passages, e.budgets, *READINGS[reading], e.gamma, Sampling(recipe.temperature))
    for number, cell in enumerate(found, 1):
        progress(f"measure, {reading}", number, len(keys) * len(e.budgets), "")
        yield asdict(cell)


# -- the table


def results(out: Path) -> list[dict]:
    found = [read_json(path) for path in sorted(out.glob("*/measured.json"))]
    return sorted(found, key=lambda r: (list(ARMS).index(r["arm"]), r["seed"]))


@app.command()
def table(out: Annotated[Path, typer.Argument(help="Folder of the experiment.")] = Path("runs/ablation")) -> None:
    """Print the table of what is measured so far."""
    typer.echo(as_markdown(results(out)))


def rate(found: list[dict], **wanted) -> float:
    """Mean acceptance outside loops over cells with these values; NaN where no clean token is there."""
    rates = [c["acceptance_rate_no_loops"] for c in found if all(c[k] == v for k, v in wanted.items())]
    rates = [r for r in rates if r is not None]
    return sum(rates) / len(rates) if rates else math.nan


def as_markdown(found: list[dict]) -> str:
    """Acceptance outside loops, mean over data sets, contexts and seeds (± half the range of the seeds)."""
    if not found:
        return "Nothing is measured yet."
    sample = found[0]["readings"]["window"]
    budgets, contexts = (list(dict.fromkeys(c[key] for c in sample)) for key in ("budget", "context"))
    numbers = [b for b in budgets if b != "full"]
    least, short, long = min(numbers), min(contexts), max(contexts)
    names = ["arm", "read", "seeds", *map(str, budgets), f"full - {least}", f"{short} - {long} at {least}"]
    names += [f"gained at {least}", "mean of budgets", "supervised positions a target token", "target tok/s"]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * 3 + " ---: |" * (len(names) - 3)]
    before: dict[str, tuple[float, float]] = {}  # of the row above that is read the same way
    for name, reading in dict.fromkeys((r["arm"], reading) for r in found for reading in r["readings"]):
        mine = [r for r in found if r["arm"] == name and reading in r["readings"]]
        grids = [r["readings"][reading] for r in mine]

        def over_seeds(value: Callable[[list[dict]], float], grids=grids) -> tuple[float, float]:
            values = [value(grid) for grid in grids]
            return sum(values) / len(values), (max(values) - min(values)) / 2

        at = {b: over_seeds(lambda g, b=b: rate(g, budget=b)) for b in budgets}
        flat = over_seeds(lambda g: rate(g, budget="full") - rate(g, budget=least))
        far = over_seeds(lambda g: rate(g, budget=least, context=short) - rate(g, budget=least, context=long))
        mean = sum(at[b][0] for b in numbers) / len(numbers)
        gained = [f"{100 * (x - y):+.1f}" for x, y in zip((at[least][0], mean), before.get(reading, ()))]
        gained, before[reading] = gained or ["", ""], (at[least][0], mean)
        trained = [r["trained"] for r in mine if r["trained"]]
        cost = ["", ""]
        if trained:
            speed = statistics.median(t["tokens_per_second"] for t in trained)
            cost = [f"{trained[0]['positions_per_target_token']:.3g}", f"{speed:.0f}"]
        row = [ARMS[name].meaning, " ".join(READINGS[reading]), str(len(mine))]
        row += [f"{100 * m:.1f} ± {100 * s:.1f}" for m, s in at.values()]
        row += [f"{100 * m:+.1f} ± {100 * s:.1f}" for m, s in (flat, far)]
        lines.append("| " + " | ".join([*row, *gained, *cost]) + " |")
    kinds = ", ".join(dict.fromkeys(c["dataset"] for c in sample))
    passages = sum(c["passages"] for c in sample if c["budget"] == least)
    foot = f"Acceptance outside loops in %, γ {sample[0]['gamma']}, {passages} passages of {kinds}; "
    foot += "gained: against the row above that is read the same way."
    return "\n".join([*lines, "", foot])


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
    """Seconds a step (median, after one that does not count), the process's peak memory, positions taught."""
    with tempfile.TemporaryDirectory() as folder:
        job = Distillation(recipe, Path(folder), Watcher())
        loaded = peak_memory(job.device)
        trainer, taken = Trainer(job.drafter, recipe.optimizer), []
        windows = RandomWindows(recipe, job.target.config.vocab_size)
        for step in range(steps + 1):
            began = time.perf_counter()
            trainer.step(lambda pieces, step=step: job.parts(windows, step, pieces), 0.1)
            taken.append(time.perf_counter() - began)
        return {
            "views": len(job.plan.views),
            "positions": round(job.plan.supervised * recipe.data.context),
            "windows": recipe.optimizer.windows_per_step,
            "context": recipe.data.context,
            "seconds": statistics.median(taken[1:]),
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
    names = [name for name in chosen(arms) if ARMS[name].change]
    found = {}
    for name in names:
        note(f"{name}: {steps + 1} steps of {base.optimizer.windows_per_step} × {base.data.context} tokens")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:  # its peak memory is its own
            found[name] = fresh.submit(cost_of, ARMS[name].change(base), steps).result()
    typer.echo(cost_markdown(found))


def cost_markdown(found: dict[str, dict]) -> str:
    names = "arm, views, supervised positions per target forward, × the first, s a step, target tok/s, positions/s"
    names += ", peak memory, above loading"
    lines = ["| " + names.replace(", ", " | ") + " |", "| --- |" + " ---: |" * 8]
    first = next(iter(found.values()))["positions"]
    for name, c in found.items():
        pace = c["windows"] / c["seconds"]
        row = [ARMS[name].meaning, str(c["views"]), str(c["positions"]), f"{c['positions'] / first:.1f}"]
        row += [f"{c['seconds']:.2f}", f"{pace * c['context']:.0f}", f"{pace * c['positions']:.0f}"]
        row += [f"{c['peak'] / 1e9:.2f} GB", f"{(c['peak'] - c['loaded']) / 1e9:.2f} GB"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(app)
