"""Distil a drafter: L = L_A + λ·L_C, full and budgeted views of one text in every step, all positions supervised.

windows (corpus, ends written by the target) -> target hidden states -> views of the drafter -> loss -> step
held-out passages written by the target -> acceptance grid, before, while and after -> best drafter
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bdcli.checkpoint import fingerprint, resolve, save_model
from bdcli.config import ModelConfig
from bdcli.decode import load_pair
from bdcli.errors import UserError
from bdcli.interrupt import deferred_interrupt
from bdcli.model import Model
from bdcli.options import DecodeOptions
from bdcli.recipe import as_dict
from bdcli.rope import RopeTable
from bdcli.train.acceptance import Cell, Passage, acceptance_cell
from bdcli.train.distill_recipe import DistillRecipe
from bdcli.train.files import check_room, digest
from bdcli.train.losses import HiddenTarget, head_loss
from bdcli.train.optimizers import warm_cosine
from bdcli.train.prepare import Material
from bdcli.train.trainer import Trainer
from bdcli.train.view_forward import view_hidden
from bdcli.views import View, plan_view

STATE = "state.pt"
KEPT_TARGETS_BYTES = 2**30  # hidden states of the target kept between passes over the windows


@dataclass
class Watcher:
    """Callbacks of a run; the defaults do nothing. `progress(phase, done, total, note)`, `grid(step, cells)`."""

    progress: Callable[[str, int, int, str], None] = lambda *_: None
    grid: Callable[[int, list[Cell]], None] = lambda *_: None


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
    dropped: dict[str, int]
    positions_per_target_token: int
    tokens_per_second: float


class Distillation:
    """One run in the folder `out`; every phase leaves a file there and is not done twice."""

    def __init__(self, recipe: DistillRecipe, out: Path, watcher: Watcher, deadline: float = math.inf):
        self.recipe, self.out, self.watcher, self.deadline = recipe, out, watcher, deadline
        self.folders = resolve(recipe.target, "target"), resolve(recipe.drafter, "drafter")
        options = DecodeOptions(target=recipe.target, drafter=recipe.drafter, dtype="float32", device="cpu")
        self.pair = load_pair(options)
        self.target, self.drafter = self.pair.target, self.pair.drafter
        longest = max(recipe.data.context, *recipe.evaluation.contexts) + recipe.evaluation.new_tokens
        for role, model in (("target", self.target), ("drafter", self.drafter)):
            if longest > model.config.max_position:
                raise UserError(
                    f"the recipe needs {longest} positions, the {role} has {model.config.max_position}",
                    "Lower data.context or evaluation.contexts",
                )
        out.mkdir(parents=True, exist_ok=True)
        check_room(out, self.disk_bytes)
        self.key = digest(as_dict(recipe), *map(fingerprint, self.folders))
        self._hidden: dict[int, Tensor] = {}
        self._rope: dict[ModelConfig, RopeTable] = {}

    def plan(self) -> Iterator[str]:
        """What the run will do and what it needs, in lines."""
        r, views = self.recipe, len(self.draw_views(0))
        tokens = r.optimizer.windows_per_step * r.data.context
        written = round(r.data.written * r.data.windows) * r.data.written_tokens
        written += r.evaluation.passages * len(r.evaluation.contexts) * r.evaluation.new_tokens
        sizes = [f"{sum(t.numel() for t in m.tensors()) / 1e6:.1f} M parameters" for m in (self.target, self.drafter)]
        yield f"target {r.target} ({sizes[0]}), drafter {r.drafter} ({sizes[1]})"
        yield f"the target writes {written} tokens: ends of training windows and held-out passages"
        yield f"{r.optimizer.steps} steps × {tokens} tokens × {views} views: {views} supervised positions per token"
        hidden = r.data.windows * r.data.context * self.target.config.hidden_size * 4
        activations = 64 * views * r.data.context * self.drafter.config.hidden_size * len(self.drafter.layers)
        memory = (
            self.target.weight_bytes + 4 * self.drafter.weight_bytes + min(hidden, KEPT_TARGETS_BYTES) + activations
        )
        yield f"memory about {memory / 1e9:.1f} GB, disk {self.disk_bytes / 1e6:.0f} MB in {self.out}"

    @property
    def disk_bytes(self) -> int:
        """State with optimizer moments, two drafters, and the windows."""
        return 4 * self.drafter.weight_bytes + 4 * self.recipe.data.windows * self.recipe.data.context

    def run(self, resume: bool) -> Outcome:
        """All of it. Ctrl-C or the deadline ends training after the current step with the state saved."""
        state = self.out / STATE
        if state.exists() and not resume:
            raise UserError(f"{self.out} holds an earlier run", "Go on with --resume, or give another --out")
        material = Material(self.recipe, self.out, self.pair, self.folders, self.watcher.progress)
        windows, dropped = material.windows()
        passages = material.passages()
        initial, best = self.out / "initial", self.out / "drafter"
        if not initial.exists():
            save_model(self.drafter, self.folders[1], initial)
        trainer = Trainer(self.drafter, self.recipe.optimizer)
        if state.exists():
            trainer.load(state, self.key)
        stopped, tokens_per_second = self._train(trainer, windows, passages)
        p = trainer.progress
        grids = {grid["step"]: [Cell(**cell) for cell in grid["cells"]] for grid in p.history}
        return Outcome(
            status="interrupted" if stopped == "interrupted" else "done",
            stopped=stopped,
            initial=initial,
            checkpoint=best,
            before=grids[0],
            after=grids[p.best_step],
            steps=p.step,
            best_step=p.best_step,
            skipped=p.skipped,
            dropped=dropped,
            positions_per_target_token=len(self.draw_views(0)),
            tokens_per_second=tokens_per_second,
        )

    def _train(self, trainer: Trainer, windows: Tensor, passages: list[Passage]) -> tuple[str | None, float]:
        """Steps with a grid every so often. Returns why it stopped early, or None, and target tokens per second."""
        p, o = trainer.progress, self.recipe.optimizer
        grid_s = self._measure(trainer, passages)
        first, trained_s, stopped = p.step, 0.0, None
        with deferred_interrupt() as interrupted:
            while p.step < o.steps and not stopped:
                began = time.monotonic()
                loss = trainer.step(self._micro_batches(windows, p.step), warm_cosine(p.step, o.warmup, o.steps))
                step_s = time.monotonic() - began
                trained_s += step_s
                self.watcher.progress("distil", p.step, o.steps, f"loss {loss:.3f}")
                late = began + 2 * step_s + 1.5 * grid_s > self.deadline
                stopped = "interrupted" if interrupted else "out of time" if late else None
                if p.step % self.recipe.evaluation.every == 0 and not stopped:
                    grid_s = self._measure(trainer, passages)
                    trainer.save(self.out / STATE, self.key)
            if stopped != "interrupted":
                self._measure(trainer, passages)
            trainer.save(self.out / STATE, self.key)
        tokens = (p.step - first) * o.windows_per_step * self.recipe.data.context
        return stopped, tokens / trained_s if trained_s else 0.0

    def draw_views(self, step: int) -> list[View | None]:
        """Views of a step: the full one first; a function of (seed, step)."""
        v, rng = self.recipe.views, random.Random(f"{self.recipe.seed}/{step}")
        if v.mode == "full":
            return [None]
        if v.mode == "sampled":
            budgets = rng.choices(v.budgets, v.weights or None)
        else:
            low, high = min(v.budgets), max(v.budgets)
            budgets = [low, high, round(math.exp(rng.uniform(math.log(low), math.log(high))))]
        context = self.recipe.data.context
        return [None, *(plan_view(b, "window", v.positions, None, context) for b in budgets)]

    def order(self, step: int) -> list[int]:
        """Windows of a step: each pass over the data is a permutation of its own."""
        per, n = self.recipe.optimizer.windows_per_step, self.recipe.data.windows
        places = range(step * per, (step + 1) * per)
        return [random.Random(f"{self.recipe.seed}:{at // n}").sample(range(n), n)[at % n] for at in places]

    def _micro_batches(self, windows: Tensor, step: int) -> list[Callable[[], Tensor]]:
        views, picked = self.draw_views(step), self.order(step)
        return [lambda w=w: self.loss(windows[w].long(), w, views, len(picked)) for w in picked]

    def loss(self, ids: Tensor, window: int, views: Sequence[View | None], share: int) -> Tensor:
        """(L_A + λ·L_C) / share of one window: means over its positions, L_C a mean over the sparse views as well."""
        hidden = self.target_hidden(ids, window)
        x = view_hidden(self.drafter, self.rope(self.drafter, len(ids)), ids, views)
        x = F.rms_norm(x, x.shape[-1:], self.drafter.norm, self.drafter.config.norm_eps)
        weights = torch.ones(x.shape[:-1])
        weights[1:] = self.recipe.loss.sparse_weight / max(1, len(views) - 1)
        target = HiddenTarget(hidden, self.target.head)
        settings = self.recipe.loss
        loss, _ = head_loss(
            x, self.drafter.head, target, settings.kind, settings.temperature, weights, float(len(ids) * share)
        )
        return loss

    @torch.no_grad()
    def target_hidden(self, ids: Tensor, window: int) -> Tensor:
        """The target's normed last hidden states [T, hidden]; kept between passes while memory allows."""
        if window in self._hidden:
            return self._hidden[window]
        x = view_hidden(self.target, self.rope(self.target, len(ids)), ids, [None])[0]
        x = F.rms_norm(x, x.shape[-1:], self.target.norm, self.target.config.norm_eps)
        if (len(self._hidden) + 1) * x.numel() * x.element_size() <= KEPT_TARGETS_BYTES:
            self._hidden[window] = x
        return x

    def rope(self, model: Model, length: int) -> RopeTable:
        config = model.config
        if config not in self._rope:
            self._rope[config] = RopeTable(config.rope, length, length, model.dtype, model.device)
        return self._rope[config]

    def grid(self, passages: Sequence[Passage]) -> list[Cell]:
        """Acceptance of every context and budget of the recipe."""
        e, positions = self.recipe.evaluation, self.recipe.views.positions
        return [
            acceptance_cell(self.drafter, group, None if budget == "full" else budget, "window", positions, e.gamma)
            for group in _by_context(passages)
            for budget in e.budgets
        ]

    def _measure(self, trainer: Trainer, passages: Sequence[Passage]) -> float:
        """Add this step's grid to the history, once; keep the drafter best in the mean over budgets. Seconds taken."""
        p, began = trainer.progress, time.monotonic()
        if p.history and p.history[-1]["step"] == p.step:
            return 0.0
        cells = self.grid(passages)
        p.history.append({"step": p.step, "cells": [asdict(c) for c in cells]})
        sparse = [c for c in cells if c.budget != "full"] or cells
        score = sum(c.acceptance_rate or 0.0 for c in sparse) / len(sparse)
        if score > p.best:
            p.best, p.best_step = score, p.step
            save_model(self.drafter, self.folders[1], self.out / "drafter")
        self.watcher.grid(p.step, cells)
        return time.monotonic() - began


def _by_context(passages: Sequence[Passage]) -> Iterator[list[Passage]]:
    for key in dict.fromkeys((p.dataset, len(p.prompt)) for p in passages):
        yield [p for p in passages if (p.dataset, len(p.prompt)) == key]
