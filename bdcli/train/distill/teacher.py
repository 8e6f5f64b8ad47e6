"""The target's answers for every position of a window: read from a shard, kept from an earlier pass, or made."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bdcli.config.distill import DistillRecipe
from bdcli.model.llama import Model
from bdcli.train.forward import final_rows
from bdcli.train.targets import ArgmaxTarget, HiddenTarget, Target, TopKTarget

KEPT_TARGETS_BYTES = 2**30  # hidden states of the target kept between passes over the windows
LOGIT_ROWS = 512  # rows whose logits live at once while answers are stored


class WindowSource(Protocol):
    """Windows of one length, by number."""

    def __len__(self) -> int: ...
    def ids(self, window: int) -> Tensor: ...  # [T], int64
    def target(self, window: int) -> Target | None: ...  # answers that are stored with it


class TeacherAnswers:
    """Answers of `target` for windows. Hidden states of about the first KEPT_TARGETS_BYTES stay in memory."""

    def __init__(self, target: Model):
        self._target = target
        self._kept: dict[int, Tensor] = {}

    def of(self, windows: WindowSource, window: int, ids: Tensor) -> Target:
        """Answers for ids [T] of a window, on the target's device."""
        stored = windows.target(window)
        if stored is not None:
            return stored
        hidden = self._kept.get(window)
        if hidden is None:
            hidden = final_rows(self._target, ids)
            if (len(self._kept) + 1) * hidden.numel() * hidden.element_size() <= KEPT_TARGETS_BYTES:
                self._kept[window] = hidden
        return HiddenTarget(hidden, self._target.head)


@torch.no_grad()
def answers_to_store(recipe: DistillRecipe, target: Model, ids: Tensor) -> dict[str, Tensor]:
    """The answers for ids [T] that `data.cache` asks for, as columns of a shard, on the CPU."""
    d = recipe.data
    if d.cache == "none":
        return {}
    hidden = final_rows(target, ids.long().to(target.device))
    if d.cache == "hidden":
        return {"hidden": hidden.bfloat16().cpu()}
    index, log_probs, best = [], [], []
    for rows in hidden.split(LOGIT_ROWS):
        logits = F.linear(rows, target.head).float()
        best.append(logits.argmax(-1).int().cpu())
        if d.cache == "topk":
            top = (logits / recipe.loss.temperature).log_softmax(-1).topk(d.top_k)
            index.append(top.indices.int().cpu())
            log_probs.append(top.values.half().cpu())
    if d.cache == "argmax":
        return {"argmax": torch.cat(best)}
    return {"index": torch.cat(index), "log_probs": torch.cat(log_probs)}


def stored_target(row: dict[str, Tensor], head: Tensor, temperature: float) -> Target | None:
    """What `answers_to_store` put into a row of a shard, on the device of `head`; None where it put nothing."""
    device = head.device
    if "hidden" in row:
        return HiddenTarget(row["hidden"].to(device, head.dtype), head)
    if "index" in row:
        return TopKTarget(row["index"].to(device), row["log_probs"].to(device), temperature)
    return ArgmaxTarget(row["argmax"].to(device)) if "argmax" in row else None
