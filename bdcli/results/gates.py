"""What a cell must pass before its figures count. Pure functions of stored rows; each returns objections, or nothing.

`bench` applies them while it measures and `report` applies them again to what it reads, so a row that was edited, or
that stands beside another machine's baseline, is refused whenever it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from bdcli.config.bench import BUDGETED, PEER_METHODS
from bdcli.results.cells import counted, paired, seal
from bdcli.results.schema import Prompt, Run

MIN_SAMPLES = 2  # below it there is no interval
MAX_LOOPED = 0.9  # share of new tokens, ends of 8-grams seen before, beyond which the figures describe a loop
# An arm and its AR must agree in all of these, or their ratio says nothing.
COMPARED_COLUMNS = (
    "experiment",
    "dataset",
    "context",
    "target",
    "machine",
    "host",
    "device",
    "attention",
    "dtype",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "git_revision",
)
STOP_RULES = ("max_new_tokens", "eos")


def objections(run: Run, rows: Sequence[Prompt], ar: Run | None, ar_rows: Sequence[Prompt]) -> list[str]:
    """Why the cell is invalid; empty when it is not."""
    return [*join_objections(run, rows, ar, ar_rows), *text_objections(run, rows), *figure_objections(run, rows)]


def join_objections(run: Run, rows: Sequence[Prompt], ar: Run | None, ar_rows: Sequence[Prompt]) -> Iterator[str]:
    """The baseline is AR of the same experiment, context, data set, machine, target and prompts."""
    if ar is None or ar.method != "ar":
        yield "no AR baseline was measured with it"
        return
    for name in COMPARED_COLUMNS:
        if name == "dtype" and run.method in PEER_METHODS:
            continue  # a peer may run in the one it is fastest in
        mine, theirs = getattr(run, name), getattr(ar, name)
        if mine != theirs:
            yield f"its AR baseline has another {name} ({theirs}, not {mine})"
    for name in STOP_RULES:
        if run.config.get(name) != ar.config.get(name):
            yield f"its AR baseline stops by another {name}"
    good = counted(run, rows)
    missing = len(good) - len(paired(good, ar_rows))
    if missing:
        yield f"AR has not read {missing} of its {len(good)} prompts"
    if any(row.context != run.context for row in (*rows, *ar_rows)):
        yield f"a prompt is not {run.context} tokens long"


def seal_objections(run: Run, rows: Sequence[Prompt], ar: Run | None, ar_rows: Sequence[Prompt]) -> Iterator[str]:
    """A stored cell, and its baseline, are as they were measured. For whoever reads the store later."""
    for name, row, prompts in (("the row", run, rows), ("its AR baseline", ar, ar_rows)):
        if row is not None and row.seal != seal(row, prompts):
            yield f"{name} was changed after it was measured" if row.seal else f"{name} was never completed"


def text_objections(run: Run, rows: Sequence[Prompt]) -> Iterator[str]:
    """Every text is one that AR would have written: finite logits, no token after an end, the same tokens."""
    failed = [row for row in rows if row.error is not None]
    if failed:
        yield failed[0].error
    eos, limit = set(run.config.get("eos", ())), run.config.get("max_new_tokens", math.inf)
    good = [row for row in rows if row.error is None]
    if any(eos & set(row.tokens[:-1]) for row in good):
        yield "a text continues after an end token"
    if any(len(row.tokens) > limit for row in good):
        yield f"a text is longer than {limit} tokens"
    if any(row.finish_reason == "length" and len(row.tokens) < limit for row in good):
        yield f"a text ends before {limit} tokens and without an end token"
    if run.method not in PEER_METHODS and any(row.output_equal is False for row in good):
        count = sum(row.output_equal is False for row in good)
        yield f"{count} of {len(good)} texts differ from AR's"


def remarks(run: Run, rows: Sequence[Prompt], ar: Run | None) -> Iterator[str]:
    """What a reader of a cell should know, whether it is valid or not: a greedy peer whose texts are not AR's.

    A peer rounds in its own way, so that is no objection; in the same dtype it is worth a look at its settings.
    """
    good = counted(run, rows)
    different = sum(row.output_equal is False for row in good)
    greedy = run.temperature == 0 and ar is not None and run.dtype == ar.dtype
    if run.method in PEER_METHODS and greedy and different:
        yield f"{different} of {len(good)} texts differ from AR's, which ran in the same dtype"


def figure_objections(run: Run, rows: Sequence[Prompt]) -> Iterator[str]:
    """There is enough to count, it adds up, it keeps its budget, and it does not describe a loop."""
    good = counted(run, rows)
    if len(good) < MIN_SAMPLES:
        yield f"{len(good)} sample{'s' if len(good) != 1 else ''}, at least {MIN_SAMPLES} are needed"
    for row in good:
        speed = row.tokens_per_second
        if speed is None or not math.isfinite(speed) or speed <= 0:
            yield "a speed is not a positive number"
            break
    for row in good:
        known = [r for r in row.rounds if r[1] is not None]
        if any(accepted > drafted for _, drafted, accepted, _, _ in known):
            yield "a round accepted more than it drafted"
            break
        if sum(r[0] for r in row.rounds) != len(row.tokens):
            yield "rounds and tokens do not add up"
            break
    bounded = run.method in BUDGETED and run.method != "official" and isinstance(run.budget, int)
    most = max((row.max_drafter_entries or 0 for row in good), default=0)
    if bounded and most > run.budget:
        yield f"the drafter held {most} entries, its budget is {run.budget}"
    new = sum(row.new_tokens for row in good)
    looped = sum(row.loop_rate * row.new_tokens for row in good)
    if new and looped > MAX_LOOPED * new:
        yield f"the text loops: {looped:.0f} of its {new} tokens do"
