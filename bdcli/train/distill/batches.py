"""The micro-batches of each step: which windows, under which selections, on which rank."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

from torch import Tensor

from bdcli.cache.selection import Selection
from bdcli.config.distill import DistillRecipe
from bdcli.model.llama import Model
from bdcli.train.distill.objective import Objective
from bdcli.train.distill.plan import draw_selections
from bdcli.train.distill.teacher import TeacherAnswers, WindowSource
from bdcli.train.distributed import ALONE, Ranks


class Batches:
    """Losses of the windows of each step, a function of (seed, step)."""

    def __init__(
        self, recipe: DistillRecipe, windows: WindowSource, target: Model, objective: Objective, ranks: Ranks = ALONE
    ):
        self._recipe, self._windows, self._ranks = recipe, windows, ranks
        self._objective, self._answers, self._device = objective, TeacherAnswers(target), target.device

    def order(self, step: int) -> list[int]:
        """Windows of a step: each pass over the data is a permutation of its own."""
        per_step, windows = self._recipe.optimizer.windows_per_step, len(self._windows)
        places = range(step * per_step, (step + 1) * per_step)
        return [_permutation(self._recipe.seed, at // windows, windows)[at % windows] for at in places]

    def losses(self, step: int, pieces: int) -> list[Callable[[], Tensor]]:
        """This rank's shares of the loss of a step.

        Each is a window under all selections, or under some at a time, in up to `pieces`, where memory is short.
        """
        selections, windows = draw_selections(self._recipe, step), self.order(step)
        size = -(-len(selections) // min(pieces, len(selections)))
        groups = [selections[at : at + size] for at in range(0, len(selections), size)]
        counts = len(windows), len(selections) - 1
        return [partial(self.loss, w, group, *counts) for w in self._ranks.share(windows) for group in groups]

    def loss(self, window: int, selections: Sequence[Selection], windows: int, sparse: int | None = None) -> Tensor:
        """`Objective.loss` of one window, by number."""
        ids = self._windows.ids(window).to(self._device)
        answers = self._answers.of(self._windows, window, ids)
        return self._objective.loss(ids, answers, selections, windows, sparse)


@lru_cache(maxsize=2)  # a step may stand between two passes
def _permutation(seed: int, turn: int, windows: int) -> list[int]:
    return random.Random(f"{seed}:{turn}").sample(range(windows), windows)
