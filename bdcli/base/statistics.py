"""Intervals over documents, prompts or passages."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

RESAMPLES = 1000


def bootstrap(
    items: Sequence[T],
    statistic: Callable[[Sequence[T]], float | None],
    resamples: int = RESAMPLES,
    tail: float = 0.025,
) -> tuple[float | None, float | None]:
    """Percentile bootstrap interval of `statistic` over items drawn with replacement, `tail` left out at each end
    (Efron 1979): 95 % by default; each bound alone is a one-sided one of 1 - `tail`.

    None with fewer than two items, or where the statistic of all has no value.
    """
    if len(items) < 2 or statistic(items) is None:
        return None, None
    rng = random.Random(0)
    drawn = (statistic(rng.choices(items, k=len(items))) for _ in range(resamples))
    values = sorted(value for value in drawn if value is not None)
    return values[int(tail * len(values))], values[math.ceil((1 - tail) * len(values)) - 1]
