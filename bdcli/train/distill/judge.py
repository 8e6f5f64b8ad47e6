"""Judges a drafter while it learns: its acceptance on held-out passages, the best one so far, when to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from bdcli.base.progress import Progress
from bdcli.config.distill import DistillRecipe
from bdcli.model.llama import Model
from bdcli.speculation.sampling import Sampling
from bdcli.train.acceptance import Cell, Passage, acceptance_grid
from bdcli.train.distill.plan import grid_selections
from bdcli.train.trainer import TrainingState


class Judge:
    """Measures the grid of `recipe` on `passages`; calls `keep` where a drafter is the best so far.

    `vocabulary` is the target's size.
    """

    def __init__(
        self,
        recipe: DistillRecipe,
        drafter: Model,
        vocabulary: int,
        passages: Sequence[Passage],
        keep: Callable[[], None],
        progress: Progress,
    ):
        self._recipe, self._drafter, self._vocabulary, self._passages = recipe, drafter, vocabulary, passages
        self._keep, self._progress = keep, progress

    def measure(self, state: TrainingState) -> float:
        """Add this step's grid to the history, once. Returns seconds."""
        began = time.monotonic()
        if state.history and state.history[-1]["step"] == state.step:
            return 0.0
        cells = self._grid()
        state.history.append({"step": state.step, "cells": [asdict(cell) for cell in cells]})
        state.latest = self._score(cells)
        if state.latest > state.best:
            state.best, state.best_step = state.latest, state.step
            self._keep()
        self._progress.measured(cells, step=state.step)
        return time.monotonic() - began

    def out_of_patience(self, state: TrainingState) -> str | None:
        """Why training may end early: the last `patience` grids were no better than one before."""
        patience = self._recipe.evaluation.patience
        since = sum(grid["step"] > state.best_step for grid in state.history)
        return f"no better for {since} measurements" if patience is not None and since >= patience else None

    def _grid(self) -> list[Cell]:
        selections, gamma = grid_selections(self._recipe), self._recipe.evaluation.gamma
        sampling = Sampling(self._recipe.temperature)
        return list(acceptance_grid(self._drafter, self._passages, selections, gamma, sampling, self._vocabulary))

    def _score(self, cells: list[Cell]) -> float:
        """Mean over budgets, or over the full cache where the drafter learns that alone."""
        full = self._recipe.views.mode == "full"
        counted = [c for c in cells if (c.budget == "full") == full] or cells
        return sum(c.score for c in counted) / len(counted)


def grid_at(state: TrainingState, step: int) -> list[Cell]:
    """The grid in the history that was measured at `step`."""
    cells = next(grid["cells"] for grid in state.history if grid["step"] == step)
    return [Cell(**cell) for cell in cells]
