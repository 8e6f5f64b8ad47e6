"""The interface of a benchmark method: what it is given, what it returns, and how its memory is measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from bdcli.base.devices import peak_memory
from bdcli.config.bench import Arm, BenchRecipe
from bdcli.results.metrics import RoundFigures
from bdcli.speculation.runner import Runner


@dataclass(frozen=True)
class PreparedTarget:
    """The target with the prompt read but for its last token, and the seconds that took; shared by all arms."""

    target: Runner
    prefill_s: float


@dataclass(frozen=True)
class Outcome:
    """One text and what it cost.

    `rounds` hold decode time only; `ttft_s` is both prefills and the first round; `entries` are the most KV entries per
    layer and KV head that the drafter held. Bytes are None for a tool in a process of its own.
    """

    tokens: list[int]
    rounds: list[RoundFigures]
    ttft_s: float
    finish_reason: str | None
    entries: int | None
    drafter_kv_bytes: int | None
    target_kv_bytes: int | None
    weight_bytes: int | None


class Block(NamedTuple):
    """New tokens that arrived together, at a moment in seconds; `drafted` of them and of the rejected ones were."""

    at: float
    tokens: int
    drafted: int


def rounds_of(blocks: Sequence[Block]) -> list[RoundFigures]:
    """Rounds from the arrival of blocks; of each all tokens but one were drafted.

    The first block's time includes reading the prompt, so it gets the mean seconds per token of the others.
    """
    first, last = blocks[0].at, blocks[-1].at
    later = sum(block.tokens for block in blocks[1:])
    per_token = (last - first) / later if later else 0.0
    seconds = [per_token * blocks[0].tokens, *(b.at - a.at for a, b in pairwise(blocks))]
    return [RoundFigures(b.tokens, b.drafted, b.tokens - 1, s) for b, s in zip(blocks, seconds, strict=True)]


class Method:
    """How one arm generates. The text of a `peer`, which is not our engine, may differ from AR's and is valid."""

    peer = False
    gamma_max = 0  # longest draft, which the cache of the shared target must hold

    def __init__(self, models, arm: Arm):
        raise NotImplementedError

    @classmethod
    def obstacle(cls, recipe: BenchRecipe) -> str | None:
        """Why the method cannot run here, with the next step; None when it can."""

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Versions of what it runs besides our own packages."""
        return {}

    def columns(self) -> dict:
        """What the store's row says about the arm besides method, budget and γ."""
        return {}

    def prepare(self, prompt: list[int]) -> None:
        """Read the prompt, where the method cannot share the engine's target. Not timed, not counted as memory."""

    def generate(self, prompt: list[int], prepared: PreparedTarget, seed: int) -> Outcome:
        """One text after the prompt, timed."""
        raise NotImplementedError

    def close(self) -> None:
        """End what was started for it."""


class MemoryMeter:
    """Bytes by which work grew the memory of the process (Linux) or of the device (CUDA); None where unknown."""

    growth: int | None = None

    @contextlib.contextmanager
    def watch(self, device: torch.device) -> Iterator[None]:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            yield
            self.growth = peak_memory(device) - before
            return
        reset = Path("/proc/self/clear_refs")
        try:
            reset.write_text("5")  # the kernel forgets the process's peak
        except OSError:  # no such kernel, or not allowed here
            yield
            return
        before = _status("VmRSS")
        yield
        self.growth = max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
