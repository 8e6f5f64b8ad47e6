"""Which products of a step matrix tiles make, and which vectors: whole steps are timed once, and the choice is kept.

One product serves all row counts, so that a row stays the same alone and among others; therefore tiles have to be no
slower where one row is read, and are worth it where many are. torch's own product does not take part: it would end the
one call that a step is, and rounds by the number of rows.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable

from bdcli.backends.cpu import tables
from bdcli.backends.cpu.machine.code_cache import code_folder
from bdcli.base.files import write_file

CHOICES = {
    "vectors": 0,
    "tiles in attention": tables.ATTENTION_TILES,
    "tiles in linear layers": sum(tables.BY_TILES) - tables.ATTENTION_TILES,
    "tiles": sum(tables.BY_TILES),
}
SLACK = 1.03  # one row may take so many times the time that the best choice takes
TRIALS = 5
STEADY = 1.05  # a best time counts once another trial came as near to it
TRIES = 4  # processes that measure a shape, at most, where the machine is too busy for steady times
FILE = "products.json"
Times = dict[str, list[list[float]]]  # by choice and number of rows: the two shortest times in ms
_known: dict[str, Times] = {}


def tiled(shape: str, rows: tuple[int, ...], step: Callable[[int, int], None]) -> int:
    """BY_TILES bits for steps of `shape`. `step(bits, rows)` runs one, and only when this shape is new here.

    `rows` are the numbers of rows that count, 1 first. Times that were not steady are kept and measured again by the
    next process, so that a busy moment does not decide for good.
    """
    if shape not in _known:
        path = code_folder() / FILE
        kept = json.loads(path.read_text()) if path.exists() else {}
        entry = kept.get(shape, {"tries": 0, "ms": {name: [[math.inf] * 2] * len(rows) for name in CHOICES}})
        if entry["tries"] < TRIES and not steady(entry["ms"]):
            entry = {"tries": entry["tries"] + 1, "ms": measured(entry["ms"], rows, step)}
            write_file(path, json.dumps(kept | {shape: entry}, indent=1))
        _known[shape] = entry["ms"]
    times = {name: [best for best, _ in each] for name, each in _known[shape].items()}
    best = min(t[0] for t in times.values())
    return CHOICES[min((name for name, t in times.items() if t[0] <= SLACK * best), key=lambda name: sum(times[name]))]


def steady(times: Times) -> bool:
    """Whether every best time was measured about twice."""
    return all(second <= STEADY * best < math.inf for each in times.values() for best, second in each)


def measured(earlier: Times, rows: tuple[int, ...], step: Callable[[int, int], None]) -> Times:
    """`earlier` with TRIALS more steps of each number of rows under each choice, choices in turn."""
    found = {name: list(each) for name, each in earlier.items()}
    for _ in range(TRIALS):
        for name, bits in CHOICES.items():
            for i, count in enumerate(rows):
                began = time.perf_counter()
                step(bits, count)
                found[name][i] = sorted([*found[name][i], 1e3 * (time.perf_counter() - began)])[:2]
    return found
