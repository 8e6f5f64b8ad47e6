"""The training loop's machinery: steps that may be skipped, optimizers, checkpoints that resume.

Randomness is a function of (seed, step), never of how often the run was stopped, so a resumed run repeats the
undisturbed one bit for bit on the same machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bdcli.errors import NonFiniteError
from bdcli.model import Model
from bdcli.train.files import read_state, write_state
from bdcli.train.optimizers import make_optimizers
from bdcli.train.settings import Updates

MAX_SKIPPED_IN_A_ROW = 10


@dataclass
class Progress:
    """What a run has done; goes into the checkpoint."""

    step: int = 0
    tokens: int = 0  # target positions read
    skipped: int = 0  # steps without update because loss or gradient was not finite
    skipped_in_a_row: int = 0
    best: float = -1.0
    best_step: int = 0
    elapsed_s: float = 0.0  # of schedules that follow the clock
    cursor: list[int] = field(default_factory=list)  # tokens taken from each source
    history: list[dict] = field(default_factory=list)


class Trainer:
    """Trains every weight of `model` (fp32) but per-head q/k norms, which the fused layout stores once per head."""

    def __init__(self, model: Model, settings: Updates):
        frozen = {id(layer.qk_norm) for layer in model.layers}
        self.parameters = [t.requires_grad_() for t in model.tensors() if id(t) not in frozen]
        self._clip = settings.clip
        self._optimizers = make_optimizers(model, settings)
        self.progress = Progress()

    def step(self, losses: list[Callable[[], Tensor]], rate: float = 1.0) -> float:
        """One update, at `rate` times the peak learning rates, from micro-batches whose losses are shares of one sum.

        Returns the loss; NaN when skipped.

        Raises NonFiniteError after several skipped steps in a row.
        """
        total = 0.0
        for loss in losses:
            value = loss()
            value.backward()
            total += float(value.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self._clip)
        p = self.progress
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
        for t in self.parameters:
            t.grad = None
        p.step += 1
        return total

    def save(self, path: Path, key: str) -> None:
        """Write the whole state, atomically. `key` names what the run depends on."""
        state = {
            "weights": [t.detach() for t in self.parameters],
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "progress": vars(self.progress),
        }
        write_state(path, key, state)

    def load(self, path: Path, key: str) -> None:
        """Go on from `save`. Raises UserError on a damaged file or one of another recipe; nothing is overwritten."""
        state = read_state(path, key)
        with torch.no_grad():
            for mine, saved in zip(self.parameters, state["weights"], strict=True):
                mine.copy_(saved)
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
