"""The training loop's machinery: AdamW with warm-up and cosine, steps that may be skipped, checkpoints that resume.

Randomness is a function of (seed, step), never of how often the run was stopped, so a resumed run repeats the
undisturbed one bit for bit on the same machine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bdcli.errors import BdcliError, NonFiniteError, UserError
from bdcli.model import Model
from bdcli.train.distill_recipe import Optimizer

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
    history: list[dict] = field(default_factory=list)


class Trainer:
    """Trains every weight of `model` (fp32) but per-head q/k norms, which the fused layout stores once per head."""

    def __init__(self, model: Model, settings: Optimizer):
        frozen = {id(layer.qk_norm) for layer in model.layers}
        self.parameters = [t.requires_grad_() for t in model.tensors() if id(t) not in frozen]
        self._settings = settings
        matrices = [t for t in self.parameters if t.dim() > 1]
        vectors = [t for t in self.parameters if t.dim() == 1]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self._adam = torch.optim.AdamW(groups, lr=settings.lr)
        self.progress = Progress()

    def rate(self, step: int) -> float:
        """Learning rate of `step` (from 0): linear warm-up, then a cosine that ends at zero."""
        s = self._settings
        if step < s.warmup:
            return s.lr * (step + 1) / s.warmup
        share = (step - s.warmup) / max(1, s.steps - s.warmup)
        return s.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    def step(self, losses: list[Callable[[], Tensor]]) -> float:
        """One update from micro-batches, whose losses are shares of one sum. Returns the loss; NaN when skipped.

        Raises NonFiniteError after several skipped steps in a row.
        """
        total = 0.0
        for loss in losses:
            value = loss()
            value.backward()
            total += float(value.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self._settings.clip)
        p = self.progress
        if math.isfinite(total) and bool(norm.isfinite()):
            for group in self._adam.param_groups:
                group["lr"] = self.rate(p.step)
            self._adam.step()
            p.skipped_in_a_row = 0
        else:
            p.skipped, p.skipped_in_a_row = p.skipped + 1, p.skipped_in_a_row + 1
            if p.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise NonFiniteError(
                    f"{p.skipped_in_a_row} steps in a row gave no finite gradient", "Lower optimizer.lr"
                )
            total = math.nan
        self._adam.zero_grad(set_to_none=True)
        p.step += 1
        return total

    def save(self, path: Path, key: str) -> None:
        """Write the whole state, atomically. `key` names what the run depends on."""
        state = {
            "key": key,
            "weights": [t.detach() for t in self.parameters],
            "adam": self._adam.state_dict(),
            "progress": vars(self.progress),
        }
        fresh = path.with_suffix(".new")
        with fresh.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)

    def load(self, path: Path, key: str) -> None:
        """Go on from `save`. Raises UserError on a damaged file or one of another recipe; nothing is overwritten."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            found = state["key"]
        except Exception as error:  # pickle, zip and torch each raise their own
            kind = type(error).__name__
            raise UserError(
                f"checkpoint {path} is damaged ({kind})", "Remove it to start over, or restore it"
            ) from None
        if found != key:
            raise UserError(
                f"checkpoint {path} belongs to another recipe, data set or model",
                "Resume with the recipe it was made by",
            )
        with torch.no_grad():
            for mine, saved in zip(self.parameters, state["weights"], strict=True):
                mine.copy_(saved)
        self._adam.load_state_dict(state["adam"])
        self.progress = Progress(**state["progress"])


def check_room(folder: Path, needed: int) -> None:
    """Raise BdcliError when the disk of `folder` has not `needed` bytes free."""
    info = os.statvfs(folder)
    free = info.f_bavail * info.f_frsize
    if free < needed:
        raise BdcliError(
            f"{folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed", "Give another --out"
        )
