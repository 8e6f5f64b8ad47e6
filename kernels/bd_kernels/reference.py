"""The law: each operation written as plainly as it can be said. Slow on purpose; fast paths are tested against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Rotate = Callable[[Tensor, int], Tensor]  # (x [..., D], position) -> x rotated to that position


def seen_positions(t: int, sinks: int, chosen: Sequence[int], window: int) -> tuple[list[int], list[int]]:
    """Positions the query at t sees: (sinks and chosen chunks, recents), each in text order, none twice."""
    front = [*range(min(sinks, t + 1)), *chosen]
    return front, list(range(max(sinks, t - window + 1), t + 1))


def budget_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t: int,
    sinks: int,
    chosen: Sequence[int],
    window: int,
    rebased: bool,
    rotate: Rotate,
) -> Tensor:
    """Output [D] of one query head under the view law.

    q [D] at position t, k and v [n, D] of its KV head for positions 0..n-1, all unrotated. With `rebased`, a sink or
    chosen key stands at its rank in text order within the view, and the query at its own rank when it looks at them;
    recents and the query looking at them stand at their true positions. One softmax over both.
    """
    front, recent = seen_positions(t, sinks, chosen, window)
    query_rank = len(front) + len(recent) - 1
    scores = []
    for rank, p in enumerate(front):
        key = rotate(k[p], rank if rebased else p)
        scores.append(rotate(q, query_rank if rebased else t) @ key)
    scores += [rotate(q, t) @ rotate(k[p], p) for p in recent]
    weights = (torch.stack(scores) * q.shape[-1] ** -0.5).softmax(0)
    return weights @ v[front + recent]
