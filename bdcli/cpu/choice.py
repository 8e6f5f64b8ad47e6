"""Which products of a step matrix tiles make, and which vectors: whole steps are timed once, and the choice is kept.

One product serves all row counts, so that a row stays the same alone and among others; therefore tiles have to be no
slower where one row is read, and are worth it where many are. torch's own product does not take part: it would end the
one call that a step is, and rounds by the number of rows.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable

from bdcli.cpu import layout as of
from bdcli.cpu.code import code_folder

CHOICES = {
    "vectors": 0,
    "tiles in attention": of.ATTENTION_TILES,
    "tiles in linear layers": sum(of.BY_TILES) - of.ATTENTION_TILES,
    "tiles": sum(of.BY_TILES),
}
SLACK = 1.03  # one row may take so many times the time that the best choice takes
TRIALS = 5
FILE = "products.json"
_known: dict[str, dict[str, list[float]]] = {}


def tiled(shape: str, rows: tuple[int, ...], step: Callable[[int, int], None]) -> int:
    """BY_TILES bits for steps of `shape`. `step(bits, rows)` runs one, and only when this shape is new here.

    `rows` are the numbers of rows that count, 1 first.
    """
    path = code_folder() / FILE
    if shape not in _known and path.exists():
        _known.update(json.loads(path.read_text()))
    if shape not in _known:
        _known[shape] = measured(rows, step)
        half = path.with_suffix(f".{os.getpid()}")
        half.write_text(json.dumps(_known, indent=1))
        half.replace(path)
    times = _known[shape]
    best = min(t[0] for t in times.values())
    return CHOICES[min((name for name, t in times.items() if t[0] <= SLACK * best), key=lambda name: sum(times[name]))]


def measured(rows: tuple[int, ...], step: Callable[[int, int], None]) -> dict[str, list[float]]:
    """Milliseconds of a step of each number of rows under each choice: the best of TRIALS, choices in turn."""
    found = {name: [math.inf] * len(rows) for name in CHOICES}
    for _ in range(TRIALS):
        for name, bits in CHOICES.items():
            for i, count in enumerate(rows):
                began = time.perf_counter()
                step(bits, count)
                found[name][i] = min(found[name][i], 1e3 * (time.perf_counter() - began))
    return found
