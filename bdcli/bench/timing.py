"""Times of decoding steps, host included, over caches of random entries. Every step is undone, so it can be repeated.

Time does not depend on what weights and caches hold, so nothing has to be read or downloaded first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bdcli.speculation.drafter import Drafter
from bdcli.speculation.runner import Runner
from bdcli.speculation.sampling import Sampling
from bdcli.speculation.speculator import Round, Speculator

REPEATS = 15  # timed calls of a step
WARM_UP_CALLS = 2  # calls before them that do not count
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}  # of the copy that shows the speed of a device's memory
TOKEN = 5  # of every text, an id that all vocabularies have


def wait(device: torch.device) -> None:
    """Return when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(steps: dict[str, Callable[[], object]], device: torch.device, repeats: int = REPEATS) -> dict[str, float]:
    """Median milliseconds of each step. All steps run once in turn, and that is repeated.

    A step that returns a float has timed itself, in milliseconds.
    """

    def run(step: Callable[[], object]) -> float:
        wait(device)
        started = time.perf_counter()
        own = step()
        wait(device)
        return own if isinstance(own, float) else 1e3 * (time.perf_counter() - started)

    turns = [{name: run(step) for name, step in steps.items()} for _ in range(repeats + WARM_UP_CALLS)]
    return {name: statistics.median(turn[name] for turn in turns[WARM_UP_CALLS:]) for name in steps}


def copy_speed(device: torch.device) -> float:
    """GB/s of a copy within the device, counted as read and written; the median of nine."""
    size_bytes = COPY_BYTES["cuda" if device.type == "cuda" else "cpu"]
    source = torch.ones(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / median_ms({"copy": lambda: target.copy_(source)}, device, 9)["copy"] / 1e6


def fill_random(runner: Runner, length: int) -> Runner:
    """Random entries up to `length`, as if a prompt had been read."""
    cache = runner.cache
    for tensor in cache.storage:
        tensor.normal_()
    cache.length = length
    cache.record(length)
    return runner


def text_of(target: Runner, drafter: Drafter | None, context: int) -> Speculator:
    """A generation whose prompt of `context` tokens has been read."""
    run = Speculator(target, drafter, Sampling(), 0, target.model.device)
    run.ids, run.prompt_tokens = [TOKEN] * context, context
    return run


@dataclass
class RoundStep:
    """A step for `median_ms`: one round that drafts `gamma` tokens after a text. Collects the rounds."""

    text: Speculator
    gamma: int
    rounds: list[Round] = field(default_factory=list)

    def __call__(self) -> float:
        """Milliseconds of a round."""
        text, length = self.text, len(self.text.ids)
        done = text.round(self.gamma)
        self.rounds.append(done)
        del text.ids[length:]
        text.target.rollback(length - 1)
        if text.drafter is not None:
            text.drafter.rollback(length - 1)
        return 1e3 * done.seconds

    @property
    def counted(self) -> list[Round]:
        """The rounds after the warm-up."""
        return self.rounds[WARM_UP_CALLS:]

    def draft_ms(self) -> float:
        """Median milliseconds of drafting in a round."""
        return 1e3 * statistics.median(r.draft_s for r in self.counted)

    def verify_ms(self) -> float:
        """Median milliseconds of verification in a round."""
        return 1e3 * statistics.median(r.verify_s for r in self.counted)

    def host_share(self) -> float | None:
        """Median share of a round in which the device did not work; None where only the host knows."""
        shares = [1 - r.device_s / r.seconds for r in self.counted if r.device_s is not None]
        return statistics.median(shares) if shares else None
