"""A setting of a recipe: one typed field with its default, its meaning and its bounds. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass

NON_NEGATIVE = "must not be negative"
TEMPERATURE = "must be 0 (greedy) or more"
INT_LIMIT = 2**63  # whole numbers are smaller: the store and seeds have 64 bits


@dataclass(frozen=True)
class Bounds:
    """Which values a setting may have, and what is said of others."""

    allows: Callable[[float], bool]
    rule: str


def above(limit: float) -> Bounds:
    """Larger than `limit`."""
    return Bounds(lambda value: value > limit, f"must be above {limit}")


def at_least(limit: float, rule: str = "") -> Bounds:
    """`limit` or more; `rule` says it in other words."""
    return Bounds(lambda value: value >= limit, rule or f"must be at least {limit}")


def within(low: float, high: float) -> Bounds:
    """From `low` to `high`, both included."""
    return Bounds(lambda value: low <= value <= high, f"must lie in {low} .. {high}")


LARGEST_COUNT = 2**31 - 1  # of tokens, in settings that the store keeps as integers
SEED = Bounds(lambda value: 0 <= value < INT_LIMIT, "must lie in 0 .. 2^63-1")
# Losses divide logits by it, in fp32: far outside this range nothing is left to learn from.
TRAINED_TEMPERATURE = Bounds(
    lambda value: value == 0 or 0.01 <= value <= 100, "must be 0 (greedy) or lie in 0.01 .. 100"
)
# What decode and bench sample with; the store's columns have the same names.
SAMPLING_BOUNDS = {
    "temperature": Bounds(lambda value: 0 <= value < math.inf, TEMPERATURE),
    "top_k": Bounds(lambda value: 0 <= value <= LARGEST_COUNT, f"must lie in 0 (off) .. {LARGEST_COUNT}"),
    "top_p": Bounds(lambda value: 0 < value <= 1, "must lie in (0, 1]; 1 is off"),
    "min_p": Bounds(lambda value: 0 <= value <= 1, "must lie in 0 (off) .. 1"),
    "repetition_penalty": Bounds(lambda value: 0.01 <= value <= 100, "must lie in 0.01 .. 100; 1 is off"),
    "seed": SEED,
}


def setting(default, meaning: str, bounds: Bounds | None = None):
    """A field of a schema. `meaning` is for help texts and the reference; None has no bounds."""
    return field(default=default, metadata={"help": meaning, "bounds": bounds})


def bounds_problems(settings, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, message) of every value out of its own bounds, in a schema and those inside it."""
    for f in fields(settings):
        value, bounds = getattr(settings, f.name), f.metadata.get("bounds")
        if is_dataclass(value):
            yield from bounds_problems(value, f"{prefix}{f.name}.")
        elif bounds is not None and value is not None and not bounds.allows(value):
            yield f"{prefix}{f.name}", bounds.rule
