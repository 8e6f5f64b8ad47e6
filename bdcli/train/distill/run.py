"""Distil a drafter: L = L_A + λ·L_C, full and budgeted views of one text in every step, all positions supervised.

windows (corpus, ends written by the target) -> target hidden states -> views of the drafter -> loss -> step
held-out passages written by the target -> acceptance grid, before, while and after -> best drafter
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bdcli.base.devices import peak_memory, pick_device, training_dtype
from bdcli.base.errors import UserError
from bdcli.base.files import check_disk_space, digest
from bdcli.base.interrupt import deferred_interrupt
from bdcli.cache.selection import Selection, parse_selection
from bdcli.config.decode import DecodeOptions
from bdcli.config.distill import DistillRecipe
from bdcli.config.loader import as_dict
from bdcli.decode.pair import load_pair
from bdcli.model.build import write_first_layers
from bdcli.model.checkpoint import fingerprint, load_model, resolve, save_model
from bdcli.model.rope import RopeTable
from bdcli.speculation.sampling import Sampling
from bdcli.train.acceptance import Cell, Passage, acceptance_grid
from bdcli.train.distill.checks import START
from bdcli.train.distill.material import Material, Windows
from bdcli.train.distill.plan import KEPT_TARGETS_BYTES, Plan, draw_selections
from bdcli.train.distributed import join, local_device
from bdcli.train.forward import anchored_hidden, final_rows, view_hidden
from bdcli.train.losses import HiddenTarget, Target, accepted_length_weights, head_loss
from bdcli.train.optimizers import warm_cosine
from bdcli.train.trainer import Trainer

STATE = "state.pt"


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
    documents: dict
    windows: dict
    positions_per_target_token: float
    tokens_per_second: float
    peak_memory_bytes: int


class Distillation:
    """One run in the folder `out`; every phase leaves files there and is not done twice.

    `data` is where its windows and passages are or will be; several runs may share it.
    """

    def __init__(
        self, recipe: DistillRecipe, out: Path, watcher: Watcher, deadline: float = math.inf, data: Path | None = None
    ):
        self.recipe, self.out, self.watcher, self.deadline = recipe, out, watcher, deadline
        self.data = data or out / "data"
        self.device = pick_device(local_device(recipe.device))
        self.ranks = join(self.device)
        out.mkdir(parents=True, exist_ok=True)
        target = resolve(recipe.target, "target")
        self.folders = target, self._start(target)
        self.dtype = training_dtype(recipe.precision, self.device)
        kind = str(self.dtype).removeprefix("torch.")
        options = DecodeOptions(target=recipe.target, drafter=str(self.folders[1]), dtype=kind, device=str(self.device))
        self.pair = load_pair(options)
        self.target, self.drafter = self.pair.target, load_model(self.folders[1], torch.float32, self.device)
        self.plan = Plan(recipe, self.target, self.drafter, self.dtype, self.device, out)
        check_disk_space(out, self.plan.disk_bytes)
        self._hidden: dict[int, Tensor] = {}

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
        now = time.monotonic()
        deadline = now + (self.deadline - now) * share
        return Material(self.recipe, self.data, self.pair, self.folders, self.watcher.progress, deadline)

    def run(self, resume: bool) -> Outcome:
        """All of it. Ctrl-C or the deadline ends training after the current step with the state saved."""
        state = self.out / STATE
        if state.exists() and not resume:
            raise UserError(f"{self.out} holds an earlier run", "Go on with --resume, or give another --out")
        with self.ranks.in_turn():
            material = self.material()
            passages, windows = material.passages(), material.windows()
        key = digest([as_dict(self.recipe), len(windows), *map(fingerprint, self.folders)])
        initial, best = self.out / "initial", self.out / "drafter"
        if self.ranks.first and not initial.exists():
            save_model(self.drafter, self.folders[1], initial)
        trainer = Trainer(self.drafter, self.recipe.optimizer, self.ranks)
        if state.exists():
            trainer.load(state, key)
        stopped, tokens_per_second = self._train(trainer, windows, passages, key)
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
            documents=asdict(windows.documents),
            windows=asdict(windows.accounts),
            positions_per_target_token=self.plan.supervised,
            tokens_per_second=tokens_per_second,
            peak_memory_bytes=peak_memory(self.device),
        )

    def _train(self, trainer: Trainer, windows: Windows, passages: list[Passage], key: str) -> tuple[str | None, float]:
        """Steps with a grid every so often. Returns why it stopped early, or None, and target tokens per second."""
        p, o = trainer.progress, self.recipe.optimizer
        grid_s = self._measure(trainer, passages)
        first, trained_s, stopped, opened = p.step, 0.0, self._flat(trainer), time.monotonic()
        with deferred_interrupt() as interrupt:
            while p.step < o.steps and not stopped:
                began = time.monotonic()
                at = p.step
                if o.follow == "time" and self.deadline < math.inf:
                    share = (began - opened) / max(1.0, self.deadline - 1.5 * grid_s - opened)
                    at = max(at, round(first + share * (o.steps - first)))
                rate = self.ranks.agreed(warm_cosine(at, o.warmup, o.steps))
                loss = trainer.step(partial(self.parts, windows, p.step), rate)
                step_s = time.monotonic() - began
                trained_s += step_s
                said = f"loss {loss:.3f}, outside loops {p.latest:.1%}, best {p.best:.1%} at step {p.best_step}"
                self.watcher.progress("distil", p.step, o.steps, said)
                late = began + 2.5 * step_s + 2 * grid_s > self.deadline
                stopped = self.ranks.agreed("interrupted" if interrupt.requested else "out of time" if late else None)
                if p.step % self.recipe.evaluation.every == 0 and not stopped:
                    grid_s = self._measure(trainer, passages)
                    self._save(trainer, key)
                    stopped = self._flat(trainer)
            if stopped != "interrupted":
                self._measure(trainer, passages)
            self._save(trainer, key)
        tokens = (p.step - first) * o.windows_per_step * self.recipe.data.context
        return stopped, tokens / trained_s if trained_s else 0.0

    def _flat(self, trainer: Trainer) -> str | None:
        """Why training may end early: the last `patience` grids were no better than one before."""
        p, patience = trainer.progress, self.recipe.evaluation.patience
        since = sum(grid["step"] > p.best_step for grid in p.history)
        return f"no better for {since} measurements" if patience is not None and since >= patience else None

    def _save(self, trainer: Trainer, key: str) -> None:
        if self.ranks.first:
            trainer.save(self.out / STATE, key)

    def order(self, step: int, windows: int) -> list[int]:
        """Windows of a step, of so many: each pass over the data is a permutation of its own."""
        per = self.recipe.optimizer.windows_per_step
        places = range(step * per, (step + 1) * per)
        return [_shuffled(self.recipe.seed, at // windows, windows)[at % windows] for at in places]

    def parts(self, windows: Windows, step: int, pieces: int) -> list[Callable[[], Tensor]]:
        """This rank's windows of a step, each under all selections, or under some at a time where memory is short."""
        selections, picked = draw_selections(self.recipe, step), self.order(step, len(windows))
        some = -(-len(selections) // min(pieces, len(selections)))
        groups = [selections[at : at + some] for at in range(0, len(selections), some)]
        share, sparse = len(picked), len(selections) - 1
        mine = self.ranks.mine(picked)
        return [partial(self.window_loss, windows, w, group, share, sparse) for w in mine for group in groups]

    def window_loss(
        self, windows: Windows, window: int, selections: Sequence[Selection], share: int, sparse: int | None = None
    ) -> Tensor:
        """`loss` of one of `windows`, whose target's answers are cached, kept from an earlier pass, or made."""
        ids, target = windows.ids(window).to(self.device), windows.target(window)
        if target is None and window in self._hidden:
            target = HiddenTarget(self._hidden[window], self.target.head)
        if target is None:
            with torch.no_grad():
                hidden = final_rows(self.target, ids)
            target = HiddenTarget(hidden, self.target.head)
            if (len(self._hidden) + 1) * hidden.numel() * hidden.element_size() <= KEPT_TARGETS_BYTES:
                self._hidden[window] = hidden
        return self.loss(ids, target, selections, share, sparse)

    def loss(
        self, ids: Tensor, target: Target, selections: Sequence[Selection], share: int, sparse: int | None = None
    ) -> Tensor:
        """Distillation loss of one window: full-view loss + λ · mean sparse-view loss, divided by `share` windows.

        ids [T]. `sparse` is the number of sparse selections of the step, where `selections` are only some of them.
        Full and window views are stacked and teach every position, or with `teach: anchored` those after each anchor.
        Selections that choose chunks teach what follows each anchor. Every term is a mean over its positions.
        """
        sparse = len(selections) - 1 if sparse is None else sparse
        sparse_weight = self.recipe.loss.sparse_weight / max(1, sparse)
        stacked = [s for s in selections if not s.chooses]
        choosing = [s for s in selections if s.chooses]
        rope = RopeTable(self.drafter.config.rope, len(ids), len(ids), self.dtype, self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            everywhere = self._stacked_rows(rope, ids, stacked)
            anchored = [self._anchored_rows(rope, ids, span, choosing) for span in self._anchor_spans() if choosing]
        total = torch.zeros((), device=self.device)
        weights = [1.0 if s.budget is None else sparse_weight for s in stacked]
        for span in self._stacked_spans(len(ids)) if stacked else ():
            part = 1 / len(self._stacked_spans(len(ids)))
            total = total + self._span_loss(everywhere[:, span], target, span, [w * part for w in weights])
        for span, rows in zip(self._anchor_spans(), anchored):
            weight = sparse_weight / len(anchored)
            total = total + self._span_loss(rows, target, span, [weight] * len(choosing))
        return total / share

    def _anchor_spans(self) -> list[slice]:
        """Rows that selections from a prompt teach: from the last position of a prompt that ends at an anchor."""
        v = self.recipe.views
        return [slice(a - 1, a - 1 + v.anchor_tokens) for a in self.recipe.anchors()] if v.select != "window" else []

    def _stacked_spans(self, length: int) -> list[slice]:
        """Rows that full and window views teach."""
        return self._anchor_spans() if self.recipe.views.teach == "anchored" else [slice(0, length)]

    def _stacked_rows(self, rope: RopeTable, ids: Tensor, selections: Sequence[Selection]) -> Tensor | None:
        """Rows [views, T, hidden] under selections that choose nothing; None without any."""
        if not selections:
            return None
        return view_hidden(self.drafter, rope, ids, [s.view(len(ids)) for s in selections])

    def _anchored_rows(self, rope: RopeTable, ids: Tensor, span: slice, selections: Sequence[Selection]) -> Tensor:
        """Rows [views, span, hidden] under selections from a prompt that ends where `span` starts."""
        ids, start = ids[: span.stop], span.start
        rows = []
        for selection in selections:
            view = selection.view(start)
            if view.depends_on_prompt:
                rows.append(anchored_hidden(self.drafter, rope, ids, start, view, self.recipe.views.prefix_gradients))
            else:  # the prompt fits whole
                rows.append(view_hidden(self.drafter, rope, ids, [view])[0, start:])
        return torch.stack(rows)

    def _span_loss(self, x: Tensor, target: Target, span: slice, scale: list[float]) -> Tensor:
        """Σ over views of scale · mean loss over the rows of `span`; x [views, rows, hidden] before the final norm."""
        s, head = self.recipe.loss, self.drafter.head
        x = F.rms_norm(x, x.shape[-1:], self.drafter.norm, self.drafter.config.norm_eps).to(self.dtype)
        target = target.cut(span)
        weights = torch.ones(x.shape[:-1], device=x.device)
        if s.weights == "accepted_length":
            with torch.no_grad():
                alpha = head_loss(x, head, target, s.kind, s.temperature)[1].alpha
            weights = accepted_length_weights(alpha, self.recipe.evaluation.gamma)
            weights /= weights.mean(-1, keepdim=True).clamp(min=1e-6)
        weights = weights * torch.tensor(scale, device=x.device)[:, None]
        return head_loss(x, head, target, s.kind, s.temperature, weights, float(x.shape[1]))[0]

    def _measure(self, trainer: Trainer, passages: Sequence[Passage]) -> float:
        """Add this step's grid to the history, once; keep the drafter of the best mean score over budgets. Seconds."""
        p, began = trainer.progress, time.monotonic()
        if p.history and p.history[-1]["step"] == p.step:
            return 0.0
        e, v, sampling = self.recipe.evaluation, self.recipe.views, Sampling(self.recipe.temperature)
        selections = [parse_selection(budget, v.select, v.positions, e.gamma) for budget in e.budgets]
        cells = list(acceptance_grid(self.drafter, passages, selections, e.gamma, sampling))
        p.history.append({"step": p.step, "cells": [asdict(c) for c in cells]})
        full = self.recipe.views.mode == "full"  # such a drafter is judged by what it learns
        counted = [c for c in cells if (c.budget == "full") == full] or cells
        score = sum(c.score for c in counted) / len(counted)
        p.latest = score
        if score > p.best:
            p.best, p.best_step = score, p.step
            if self.ranks.first:
                save_model(self.drafter, self.folders[1], self.out / "drafter")
        self.watcher.grid(p.step, cells)
        return time.monotonic() - began


@lru_cache(maxsize=2)  # a step may stand between two passes
def _shuffled(seed: int, turn: int, windows: int) -> list[int]:
    return random.Random(f"{seed}:{turn}").sample(range(windows), windows)
