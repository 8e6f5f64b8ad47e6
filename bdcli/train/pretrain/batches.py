"""What a pretrain step reads: windows of the corpus, and at the start of a guided run a lesson in copying."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bdcli.config.pretrain import PretrainRecipe
from bdcli.data.corpus import Corpus
from bdcli.model.llama import Model
from bdcli.train.forward import causal_block
from bdcli.train.held_out import next_token_rows
from bdcli.train.losses import head_loss
from bdcli.train.pretrain.copying import GUIDE_WEIGHT, guide_loss, lesson
from bdcli.train.pretrain.stages import skip_positions, stage_context
from bdcli.train.targets import ArgmaxTarget
from bdcli.train.trainer import TrainingState


@dataclass(frozen=True)
class Batch:
    """Windows [N, T] of one step, whose tokens stand at `positions` [T], and the ids of a lesson, if there is one.

    micro_tokens: tokens that go through the model at once. block: a layer's forward, compiled or not.
    """

    model: Model
    dtype: torch.dtype
    block: Callable
    micro_tokens: int
    windows: Tensor
    positions: Tensor
    lesson: Tensor | None

    def losses(self, pieces: int) -> list[Callable[[], Tensor]]:
        """Shares of the step's loss, smaller ones where `pieces` is larger."""
        count, length = self.windows.shape
        rows = max(1, self.micro_tokens // length // pieces)
        kind = {"dtype": self.dtype, "block": self.block, "positions": self.positions}
        parts = [partial(next_token_loss, self.model, some, count, **kind) for some in self.windows.split(rows)]
        return parts if self.lesson is None else [*parts, self._guide_loss]

    def _guide_loss(self) -> Tensor:
        return GUIDE_WEIGHT * guide_loss(self.model, self.lesson, self.dtype)


class Batches:
    """The batches of a run, a function of the seed, the step and the tokens taken so far.

    ordinary_ids: ids of the vocabulary that are no special tokens; `dtype` is what products run in.
    """

    def __init__(
        self, recipe: PretrainRecipe, model: Model, corpus: Corpus, ordinary_ids: Sequence[int], dtype: torch.dtype
    ):
        self._recipe, self._model, self._corpus, self._dtype = recipe, model, corpus, dtype
        self._ordinary_ids = ordinary_ids
        self._block = torch.compile(causal_block, dynamic=False) if recipe.compile else causal_block

    def draw(self, state: TrainingState, done: float) -> Batch:
        """The batch of `state.step` when `done` of the run is behind; `state.cursor` moves on."""
        r, s, device = self._recipe, self._recipe.schedule, self._model.device
        state.cursor = state.cursor or [0] * len(self._corpus.streams)
        context = stage_context(s, done)
        windows = self._corpus.take(state.cursor, context, max(1, s.tokens_per_step // context)).to(device)
        guided = done < r.corpus.guide
        return Batch(
            model=self._model,
            dtype=self._dtype,
            block=self._block,
            micro_tokens=s.micro_tokens,
            windows=windows,
            positions=skip_positions(context, s.reach, r.seed, state.step),
            lesson=lesson(r.seed, state.step, self._ordinary_ids).to(device) if guided else None,
        )


def next_token_loss(
    model: Model,
    windows: Tensor,
    count: int,
    dtype: torch.dtype = torch.float32,
    block: Callable = causal_block,
    positions: Tensor | None = None,
) -> Tensor:
    """Share of windows [N, T] in the mean next-token cross-entropy of `count` windows, in nats."""
    x, following = next_token_rows(model, windows, dtype, block, positions)
    tokens = count * (windows.shape[1] - 1)
    return head_loss(x, model.head, ArgmaxTarget(following), "ce", denominator=float(tokens))[0]
