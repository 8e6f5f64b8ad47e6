"""What a distil run will do and what it needs, from its recipe and the configurations of its models alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from bdcli.base.errors import UserError
from bdcli.cache.selection import Full, Selection, parse_selection
from bdcli.cache.view import FULL
from bdcli.config.distill import DistillRecipe
from bdcli.decode.positions import positions_note
from bdcli.model.config import ModelConfig
from bdcli.model.sizes import weight_count
from bdcli.train.distill.memory import distill_memory, memory_line
from bdcli.train.distill.teacher import KEPT_TARGETS_BYTES
from bdcli.train.distill.windows import bytes_per_token
from bdcli.train.estimate import BACKWARD, duration, forward_operations, speed
from bdcli.train.losses import kernel_rows
from bdcli.train.targets import HiddenTarget

TRAINED_BYTES = 4  # of a number of the drafter while it learns


@dataclass
class Plan:
    """Needs of a run in the folder `out`; products and the target run in `dtype`.

    Raises UserError where the target has too few positions for the recipe.
    """

    recipe: DistillRecipe
    target: ModelConfig
    drafter: ModelConfig
    dtype: torch.dtype
    device: torch.device
    out: Path

    def __post_init__(self):
        d, e = self.recipe.data, self.recipe.evaluation
        self.selections = draw_selections(self.recipe, 0)
        self.longest = max(d.context, *e.contexts) + e.new_tokens
        if self.longest > self.target.context_limit:
            raise UserError(
                f"the recipe needs {self.longest} positions, the target has {self.target.context_limit}",
                "Lower data.context or evaluation.contexts",
            )

    def lines(self) -> Iterator[str]:
        """For people."""
        r, d, views = self.recipe, self.recipe.data, len(self.selections)
        tokens = r.optimizer.windows_per_step * d.context
        written = round(d.written * d.windows) * d.written_tokens
        written += r.evaluation.passages * len(r.evaluation.contexts) * r.evaluation.new_tokens
        sizes = [f"{weight_count(config) / 1e6:.1f} M parameters" for config in (self.target, self.drafter)]
        drafter = r.drafter or f"of its first {r.layers} layers"
        yield f"target {r.target} ({sizes[0]}), drafter {drafter} ({sizes[1]})"
        budgets = {s.budget: s for s in (*self.selections, *grid_selections(r))}
        notes = [positions_note(self.drafter, s, self.longest) for s in budgets.values()]
        yield from dict.fromkeys(note for note in notes if note)
        yield f"the target writes about {written} tokens: ends of training windows and held-out passages"
        yield f"{r.optimizer.steps} steps × {tokens} tokens × {views} views"
        yield f"{self.supervised:.2f} supervised positions per token the target reads"
        if r.evaluation.patience is not None:
            yield f"stops after {r.evaluation.patience} measurements without a better acceptance"
        yield memory_line(self.memory())
        by, kind = "Triton kernels" if self._loss[0] else "torch", str(self.dtype).removeprefix("torch.")
        yield f"loss in {by} on {self.device}, {kind}"
        yield f"disk {self.disk_bytes / 1e6:.0f} MB in {self.out}"
        yield f"steps take about {duration(self.seconds())} here, writing and measuring apart"

    def memory(self) -> dict[str, int]:
        """Bytes of a step at the most demanding views, by what holds them."""
        r, d = self.recipe, self.recipe.data
        views = [s.view(d.context) for s in self.selections if not s.chooses]
        lengths = [a + r.views.anchor_tokens for a in r.anchors() for s in self.selections if s.chooses]
        parts = distill_memory(self.target, self.drafter, d.context, views, lengths, self.dtype.itemsize, self._loss[1])
        return parts | {"kept hidden states": min(self.hidden_bytes, KEPT_TARGETS_BYTES)}

    @cached_property
    def _loss(self) -> tuple[Callable | None, int]:
        """Its kernel, and rows of logits at once."""
        x = torch.empty(0, dtype=self.dtype, device=self.device)
        return kernel_rows(x, HiddenTarget(x, x), self.recipe.loss.temperature, self.drafter.vocab_size)

    @property
    def hidden_bytes(self) -> int:
        """The target's hidden states of all windows."""
        d = self.recipe.data
        return d.windows * d.context * self.target.hidden_size * self.dtype.itemsize

    def seconds(self) -> float:
        """About how long all steps take; the target reads a window once where the hidden states of all are kept."""
        r, length = self.recipe, self.recipe.data.context
        views = [FULL if s.chooses else s.view(length) for s in self.selections]  # chunks are chosen of all keys
        learned = sum(forward_operations(self.drafter, length, view.mean_keys(length)) for view in views)
        windows = r.optimizer.steps * r.optimizer.windows_per_step
        read = min(windows, r.data.windows) if self.hidden_bytes <= KEPT_TARGETS_BYTES else windows
        read *= forward_operations(self.target, length, length / 2)
        training_s = windows * BACKWARD * learned / speed(self.drafter, self.dtype, self.device)
        return training_s + read / speed(self.target, self.dtype, self.device)

    @property
    def supervised(self) -> float:
        """Positions that teach the drafter, over all views, per token that the target reads."""
        r, views = self.recipe, len(self.selections)
        anchored = len(r.anchors()) * r.views.anchor_tokens / r.data.context
        if r.views.select == "window":
            return float(views)
        return (1.0 if r.views.teach == "all" else anchored) + (views - 1) * anchored

    @property
    def disk_bytes(self) -> int:
        """Shards, state with optimizer moments, two drafters."""
        tokens = self.recipe.data.windows * self.recipe.data.context
        drafter = TRAINED_BYTES * weight_count(self.drafter)
        return 4 * drafter + bytes_per_token(self.recipe, self.target.hidden_size) * tokens


def grid_selections(recipe: DistillRecipe) -> list[Selection]:
    """What the drafter keeps where its acceptance is measured."""
    e, v = recipe.evaluation, recipe.views
    return [parse_selection(budget, v.select, v.positions, e.gamma) for budget in e.budgets]


def draw_selections(recipe: DistillRecipe, step: int) -> list[Selection]:
    """What the drafter keeps in a step: all, then each budget. A function of (seed, step)."""
    v, rng = recipe.views, random.Random(f"{recipe.seed}/{step}")
    if v.mode == "full":
        return [Full()]
    if v.mode == "sampled":
        budgets = rng.choices(v.budgets, v.weights or None)
    else:
        low, high = min(v.budgets), max(v.budgets)
        budgets = [low, high, round(math.exp(rng.uniform(math.log(low), math.log(high))))]
    return [Full(), *(parse_selection(budget, v.select, v.positions) for budget in budgets)]
