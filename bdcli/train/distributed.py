"""Several processes as one run: `torchrun` starts them, each takes its share of a step's windows, gradients are summed.

All ranks hold the same weights and take the same steps. Rank 0 prepares, writes and reports; what depends on the clock
or on a signal is decided by it for all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(hours=24)  # rank 0 may prepare for long while the others wait


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """It prepares, writes and reports for all."""
        return self.rank == 0

    def share(self, items: Sequence) -> Sequence:
        """This rank's share of the items of a step."""
        return items[self.rank :: self.size]

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Gradients of all ranks' micro-batches, which are shares of one sum, on every rank."""
        if self.size > 1:
            for t in parameters:
                t.grad = torch.zeros_like(t) if t.grad is None else t.grad
                dist.all_reduce(t.grad)

    def sum(self, value: float, device: torch.device) -> float:
        """Sum of `value` over all ranks, in fp32."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float32, device=device)
        dist.all_reduce(total)
        return float(total)

    def broadcast(self, value):
        """Rank 0's `value`, on all ranks."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Rank 0 runs the body first, so that the others find what it made."""
        if self.size > 1 and not self.first:
            dist.barrier()
        yield
        if self.size > 1 and self.first:
            dist.barrier()


ALONE = Ranks()


def join(device: torch.device) -> Ranks:
    """The ranks of torchrun's environment; one alone without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return Ranks(dist.get_rank(), size)


def local_device(device: str) -> str:
    """`auto` and `cuda` under torchrun mean this rank's own GPU."""
    place = os.environ.get("LOCAL_RANK")
    return f"cuda:{place}" if place and device in ("auto", "cuda") and torch.cuda.is_available() else device
