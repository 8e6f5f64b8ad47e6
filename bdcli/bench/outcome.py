"""The interface of a benchmark method: what it is given, what it returns, and how its memory is measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bdcli.base.devices import peak_memory
from bdcli.config.bench import Arm
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
    layer and KV head that the drafter held.
    """

    tokens: list[int]
    rounds: list[RoundFigures]
    ttft_s: float
    finish_reason: str | None
    entries: int | None
    drafter_kv_bytes: int
    target_kv_bytes: int
    weight_bytes: int


class Method:
    """How one arm generates. The text of a `peer`, which is not our engine, may differ from AR's and is valid."""

    peer = False
    gamma_max = 0  # longest draft, which the cache of the shared target must hold

    def __init__(self, models, arm: Arm):
        raise NotImplementedError

    def columns(self) -> dict:
        """What the store's row says about the arm besides method, budget and γ."""
        return {}

    def prepare(self, prompt: list[int]) -> None:
        """Read the prompt, where the method cannot share the engine's target. Not timed, not counted as memory."""

    def generate(self, prompt: list[int], prepared: PreparedTarget, seed: int) -> Outcome:
        """One text after the prompt, timed."""
        raise NotImplementedError


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
