"""How far a pretrain run is, and what its windows look like there: their length and the positions of their tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from bdcli.config.pretrain import Schedule


def normalize(shares: Sequence[float]) -> list[float]:
    """Shares that sum to 1."""
    return [share / sum(shares) for share in shares]


def share_done(schedule: Schedule, tokens: int, elapsed_s: float, horizon_s: float) -> float:
    """Share of the run that is done: by tokens, or by the clock where that is further and the recipe says so."""
    by_tokens = tokens / schedule.tokens
    return max(by_tokens, elapsed_s / max(1.0, horizon_s)) if schedule.follow == "time" else by_tokens


def stage_context(schedule: Schedule, done: float) -> int:
    """Window length, in tokens, when `done` of the run is behind."""
    end = 0.0
    for share, context in zip(normalize(schedule.shares), schedule.contexts):
        end += share
        if done < end:
            return context
    return schedule.contexts[-1]


def skip_positions(length: int, reach: int, seed: int, step: int) -> Tensor:
    """Positions [length] of the windows of one step: 0.. in order, with at most one gap, all below max(length, reach).

    Positional skip-wise training (PoSE, Zhu et al. 2023): short windows teach distances of up to `reach`. Half the
    steps skip nothing; the others skip log-uniformly many positions at a uniform place.
    """
    rng, positions = random.Random(f"skip {seed} {step}"), torch.arange(length)
    if reach > length and rng.random() < 0.5:
        gap = int(math.exp(rng.uniform(0, math.log(reach - length))))
        positions[rng.randrange(1, length) :] += gap
    return positions
