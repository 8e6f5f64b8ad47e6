"""Distil a drafter: full and budgeted views of one text in every step, all positions supervised.

windows (corpus, ends written by the target) -> target hidden states -> views of the drafter -> loss -> step
held-out passages written by the target -> acceptance grid, before, while and after -> best drafter
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from bdcli.base.devices import peak_memory, pick_device, training_dtype
from bdcli.base.errors import UserError
from bdcli.base.files import check_disk_space, digest
from bdcli.base.interrupt import deferred_interrupt
from bdcli.base.progress import SILENT, Progress
from bdcli.config.decode import DecodeOptions
from bdcli.config.distill import DistillRecipe
from bdcli.config.loader import as_dict
from bdcli.decode.pair import Pair, load_pair
from bdcli.model.build import write_first_layers
from bdcli.model.checkpoint import fingerprint, load_model, read_config, save_model
from bdcli.model.config import ModelConfig
from bdcli.model.hub import resolve
from bdcli.model.llama import Model
from bdcli.train.acceptance import Cell, Passage
from bdcli.train.distill.batches import Batches
from bdcli.train.distill.checks import START
from bdcli.train.distill.judge import Judge, grid_at
from bdcli.train.distill.material import Material
from bdcli.train.distill.objective import Objective
from bdcli.train.distill.plan import Plan
from bdcli.train.distill.teacher import WindowSource
from bdcli.train.distill.windows import Windows
from bdcli.train.distributed import Ranks, join, local_device
from bdcli.train.optimizers import warm_cosine
from bdcli.train.trainer import Trainer

STATE = "state.pt"  # file of the weights and moments that a resumed run starts from
INITIAL, BEST = "initial", "drafter"  # folders of the drafter before training, and of the best one


@dataclass(frozen=True)
class Outcome:
    """`status` is done or interrupted; `stopped` says why training ended before its last step, if it did."""

    status: str
    stopped: str | None
    initial: Path
    checkpoint: Path
    before: list[Cell]
    after: list[Cell]
    steps: int
    best_step: int
    skipped: int
    documents: dict
    windows: dict
    positions_per_target_token: float
    tokens_per_second: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Models:
    """What a run loads: the pair that writes texts, from `folders`, and the drafter that learns, in fp32."""

    folders: tuple[Path, Path]
    pair: Pair
    drafter: Model


class Distillation:
    """One run in the folder `out`; every phase leaves files there and is not done twice.

    `data` is where its windows and passages are or will be; several runs may share it. Nothing is loaded or written
    before `models`, `material` or `run` is called: `plan` reads configurations only.
    """

    def __init__(
        self,
        recipe: DistillRecipe,
        out: Path,
        progress: Progress = SILENT,
        deadline: float = math.inf,
        data: Path | None = None,
    ):
        self.recipe, self.out, self.deadline = recipe, out, deadline
        self.data = data or out / "data"
        self._progress = progress
        self._plan: Plan | None = None
        self._models: Models | None = None

    @cached_property
    def device(self) -> torch.device:
        return pick_device(local_device(self.recipe.device))

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the target, and of products of the drafter."""
        return training_dtype(self.recipe.precision, self.device)

    @cached_property
    def ranks(self) -> Ranks:
        return join(self.device)

    @cached_property
    def progress(self) -> Progress:
        """Only the first rank reports."""
        return self._progress if self.ranks.first else SILENT

    def plan(self) -> Plan:
        """Needs of the run. Raises UserError where the models do not suffice, BdcliError where the disk does not."""
        if self._plan is None:
            target = read_config(resolve(self.recipe.target, "target"))
            drafter = self._drafter_config(target)
            self._plan = Plan(self.recipe, target, drafter, self.dtype, self.device, self.out)
            check_disk_space(self.out, self._plan.disk_bytes)
        return self._plan

    def _drafter_config(self, target: ModelConfig) -> ModelConfig:
        if self.recipe.drafter is not None:
            return read_config(resolve(self.recipe.drafter, "drafter"))
        if (self.out / STATE).exists():
            return read_config(self.out / START)
        return replace(target, layers=self.recipe.layers)

    def models(self) -> Models:
        """The models, loaded at the first call. Raises UserError on every fault of a folder.

        Where the recipe names no drafter, one of the target's first layers is written to `out` and loaded.
        """
        if self._models is None:
            self.plan()
            target = resolve(self.recipe.target, "target")
            folders = target, self._start(target)
            kind = str(self.dtype).removeprefix("torch.")
            names = {"target": self.recipe.target, "drafter": str(folders[1])}
            dense = {"weights": "bf16", "draft_weights": "bf16"}  # training multiplies whole matrices
            options = DecodeOptions(**names, **dense, dtype=kind, device=str(self.device))
            pair = load_pair(options, self.progress)
            self._models = Models(folders, pair, load_model(folders[1], torch.float32, self.device))
        return self._models

    def _start(self, target: Path) -> Path:
        """Folder of the drafter to start from; made of the target's first layers where the recipe names none."""
        if self.recipe.drafter is not None:
            return resolve(self.recipe.drafter, "drafter")
        with self.ranks.in_turn():
            if self.ranks.first and not (self.out / STATE).exists():  # nothing was learned from an older one
                write_first_layers(target, self.out / START, self.recipe.layers, self.recipe.seed)
        return self.out / START

    def material(self, share: float = 0.5) -> Material:
        """What the recipe's data and evaluation ask for; making it may take `share` of the time that is left."""
        now, models = time.monotonic(), self.models()
        deadline = now + (self.deadline - now) * share
        return Material(self.recipe, self.data, models.pair, models.folders, self.progress, deadline)

    def batches(self, windows: WindowSource) -> Batches:
        """The micro-batches of every step over `windows`."""
        models = self.models()
        objective = Objective(self.recipe, models.drafter, self.dtype, models.pair.target.config.vocab_size)
        return Batches(self.recipe, windows, models.pair.target, objective, self.ranks)

    def run(self, resume: bool) -> Outcome:
        """All of it. Ctrl-C or the deadline ends training after the current step with the state saved."""
        state_file = self.out / STATE
        if state_file.exists() and not resume:
            raise UserError(f"{self.out} holds an earlier run", "Continue it with --resume, or give another --out")
        models = self.models()
        with self.ranks.in_turn():
            material = self.material()
            passages, windows = material.passages(), material.windows()
        key = digest([as_dict(self.recipe), len(windows), *map(fingerprint, models.folders)])
        if self.ranks.first and not (self.out / INITIAL).exists():
            save_model(models.drafter, models.folders[1], self.out / INITIAL)
        trainer = Trainer(models.drafter, self.recipe.optimizer, self.ranks)
        if state_file.exists():
            trainer.load(state_file, key)
        stopped, tokens_per_second = self._train(trainer, self.batches(windows), self._judge(passages), key)
        return self._outcome(trainer, windows, stopped, tokens_per_second)

    def _judge(self, passages: list[Passage]) -> Judge:
        models = self.models()

        def keep() -> None:
            if self.ranks.first:
                save_model(models.drafter, models.folders[1], self.out / BEST)

        vocabulary = models.pair.target.config.vocab_size
        return Judge(self.recipe, models.drafter, vocabulary, passages, keep, self.progress)

    def _outcome(self, trainer: Trainer, windows: Windows, stopped: str | None, tokens_per_second: float) -> Outcome:
        state = trainer.state
        return Outcome(
            status="interrupted" if stopped == "interrupted" else "done",
            stopped=stopped,
            initial=self.out / INITIAL,
            checkpoint=self.out / BEST,
            before=grid_at(state, 0),
            after=grid_at(state, state.best_step),
            steps=state.step,
            best_step=state.best_step,
            skipped=state.skipped,
            documents=asdict(windows.documents),
            windows=asdict(windows.accounts),
            positions_per_target_token=self.plan().supervised,
            tokens_per_second=tokens_per_second,
            peak_memory_bytes=peak_memory(self.device),
        )

    # -- training

    def _train(self, trainer: Trainer, batches: Batches, judge: Judge, key: str) -> tuple[str | None, float]:
        """Steps with a grid every so often. Returns why it stopped early, or None, and target tokens per second."""
        state, o = trainer.state, self.recipe.optimizer
        grid_s = judge.measure(state)
        first, trained_s, stopped = state.step, 0.0, judge.out_of_patience(state)
        opened = time.monotonic()
        with deferred_interrupt() as interrupt:
            while state.step < o.steps and not stopped:
                began = time.monotonic()
                at = self._schedule_step(state.step, first, began - opened, self.deadline - 1.5 * grid_s - opened)
                rate = self.ranks.broadcast(warm_cosine(at, o.warmup, o.steps))
                loss = trainer.step(partial(batches.losses, state.step), rate)
                step_s = time.monotonic() - began
                trained_s += step_s
                best = f"best {state.best:.1%} at step {state.best_step}"
                detail = f"loss {loss:.3f}, outside loops {state.latest:.1%}, {best}"
                self.progress.advance("distil", state.step, o.steps, detail)
                late = began + 2.5 * step_s + 2 * grid_s > self.deadline
                stopped = self.ranks.broadcast(
                    "interrupted" if interrupt.requested else "out of time" if late else None
                )
                if state.step % self.recipe.evaluation.every == 0 and not stopped:
                    grid_s = judge.measure(state)
                    self._save(trainer, key)
                    stopped = judge.out_of_patience(state)
            if stopped != "interrupted":
                judge.measure(state)
            self._save(trainer, key)
        tokens = (state.step - first) * o.windows_per_step * self.recipe.data.context
        return stopped, tokens / trained_s if trained_s else 0.0

    def _schedule_step(self, step: int, first: int, elapsed_s: float, horizon_s: float) -> int:
        """Where the learning rate stands: at `step`, or further by the clock of a session that began at `first`."""
        o = self.recipe.optimizer
        if o.follow == "steps" or self.deadline == math.inf:
            return step
        return max(step, round(first + elapsed_s / max(1.0, horizon_s) * (o.steps - first)))

    def _save(self, trainer: Trainer, key: str) -> None:
        if self.ranks.first:
            trainer.save(self.out / STATE, key)
