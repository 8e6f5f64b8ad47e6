"""The training loop's machinery: steps that may be skipped, optimizers, checkpoints that resume.

Randomness is a function of (seed, step), never of how often the run was stopped, so a resumed run repeats the
undisturbed one bit for bit on the same machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bdcli.base.errors import BdcliError, NonFiniteError
from bdcli.base.state import read_state, write_state
from bdcli.config.optimizer import Updates
from bdcli.model.llama import Model
from bdcli.train.distributed import ALONE, Ranks
from bdcli.train.optimizers import make_optimizers

MAX_SKIPPED_IN_A_ROW = 10


@dataclass
class TrainingState:
    """What a run has done; goes into the checkpoint."""

    step: int = 0
    tokens: int = 0  # target positions read
    skipped: int = 0  # steps without update because loss or gradient was not finite
    skipped_in_a_row: int = 0
    out_of_memory: int = 0  # steps repeated in smaller pieces
    pieces: int = 1  # into which micro-batches are cut since
    latest: float = 0.0  # acceptance of the last measurement, and of the best one
    best: float = -1.0
    best_step: int = 0
    elapsed_s: float = 0.0  # of schedules that follow the clock
    cursor: list[int] = field(default_factory=list)  # tokens taken from each source
    history: list[dict] = field(default_factory=list)


class Trainer:
    """Trains every weight of `model` (fp32) but per-head q/k norms, which the fused layout stores once per head."""

    def __init__(self, model: Model, settings: Updates, ranks: Ranks = ALONE):
        frozen = {id(layer.qk_norm) for layer in model.layers}
        self.parameters = [t.requires_grad_() for t in model.tensors() if id(t) not in frozen]
        self._clip, self._ranks = settings.clip, ranks
        self._optimizers = make_optimizers(model, settings)
        self.state = TrainingState()

    def step(self, parts: Callable[[int], Sequence[Callable[[], Tensor]]], rate: float = 1.0) -> float:
        """One update, at `rate` times the peak learning rates. Returns the loss; NaN when skipped.

        `parts(pieces)` gives micro-batches whose losses are shares of one sum, each cut into up to `pieces`. When one
        does not fit into memory the step is repeated with pieces of half the size, which later steps keep.

        Raises NonFiniteError after several skipped steps in a row, BdcliError where nothing is left to cut.
        """
        p = self.state
        while True:
            losses = parts(p.pieces)
            try:
                total = self._gradients(losses)
                break
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                self._clear()
                p.out_of_memory += 1
                if len(parts(2 * p.pieces)) == len(losses):
                    raise BdcliError(
                        "one window under one view does not fit into memory", "Shorten the windows or use a larger GPU"
                    ) from None
                p.pieces *= 2
        self._ranks.sum_gradients(self.parameters)
        total = self._ranks.sum(total, self.parameters[0].device)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self._clip)
        if math.isfinite(total) and bool(norm.isfinite()):
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * rate
                optimizer.step()
            p.skipped_in_a_row = 0
        else:
            p.skipped, p.skipped_in_a_row = p.skipped + 1, p.skipped_in_a_row + 1
            if p.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise NonFiniteError(
                    f"{p.skipped_in_a_row} steps in a row gave no finite gradient", "Lower optimizer.lr"
                )
            total = math.nan
        self._clear()
        p.step += 1
        return total

    def _gradients(self, losses: Sequence[Callable[[], Tensor]]) -> float:
        total = 0.0
        for loss in losses:
            value = loss()
            value.backward()
            total += float(value.detach())
        return total

    def _clear(self) -> None:
        for t in self.parameters:
            t.grad = None

    def save(self, path: Path, key: str) -> None:
        """Write the whole state, atomically. `key` names what the run depends on."""
        state = {
            "weights": [t.detach() for t in self.parameters],
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "progress": vars(self.state),
        }
        write_state(path, key, state)

    def load(self, path: Path, key: str) -> None:
        """Resume from `save`. Raises UserError on a damaged file or one of another recipe; nothing is overwritten."""
        state = read_state(path, key)
        with torch.no_grad():
            for mine, saved in zip(self.parameters, state["weights"], strict=True):
                mine.copy_(saved)
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.state = TrainingState(**state["progress"])


def _out_of_memory(error: RuntimeError) -> bool:
    """A GPU's allocator has an error of its own; the CPU's is recognised by its message."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
