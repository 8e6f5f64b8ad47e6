"""From the prompts of a cell to its figures: pure functions of stored rows, without torch.

A cell is one arm on one data set and context. Counts are pooled over prompts, speeds are medians over prompts, and the
speedup is the ratio of the two medians that stand beside it; its interval comes from drawing prompts, each with both of
its speeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean, median, stdev

from bdcli.base.files import digest
from bdcli.base.statistics import bootstrap
from bdcli.results.figures import figures_of
from bdcli.results.schema import Prompt, Run

Pair = tuple[Prompt, Prompt]  # an arm's prompt and AR's of the same ids

# What `bdcli bench --json` says about a cell, by the store's names.
CELL_FIELDS = (
    "run_id",
    "arm",
    "dataset",
    "context",
    "budget",
    "gamma",
    "method",
    "select",
    "positions",
    "target",
    "drafter",
    "device",
    "attention",
    "dtype",
    "temperature",
    "acceptance_rate",
    "acceptance_low",
    "acceptance_high",
    "acceptance_rate_no_loops",
    "mean_accepted_length",
    "ttft_s",
    "tokens_per_second",
    "ar_tokens_per_second",
    "ar_variation",
    "speedup",
    "speedup_low",
    "speedup_high",
    "speedup_no_loops",
    "loop_rate",
    "output_equal",
    "ties",
    "max_drafter_entries",
    "drafter_kv_bytes",
    "target_kv_bytes",
    "peak_memory_bytes",
    "valid",
    "invalid_reason",
)
# Columns that change after a cell was measured, or that are no part of the measurement.
UNSEALED = {"status", "error", "started_at", "finished_at", "pid", "process_started", "process_identity", "seal"}
SEAL_DIGITS = 32
UNSEALED_PROMPT = {"id", "run_id", "text"}


def cell_json(run: Run) -> dict:
    return {name: getattr(run, name) for name in CELL_FIELDS} | {"samples": run.prompts}


def counted(run: Run, rows: Sequence[Prompt]) -> list[Prompt]:
    """The rows that count: those after the warm-up prompts, without errors."""
    return [r for r in rows if r.index >= run.config.get("warmup_samples", 0) and r.error is None]


def paired(rows: Sequence[Prompt], ar_rows: Sequence[Prompt]) -> list[Pair]:
    """Rows with AR's row of the same prompt ids; those without one are left out."""
    by_prompt = {r.sha256: r for r in ar_rows if r.error is None}
    return [(r, by_prompt[r.sha256]) for r in rows if r.sha256 in by_prompt]


def summarise(rows: Sequence[Prompt], ar_rows: Sequence[Prompt]) -> dict:
    """Columns of a cell's row from its counted prompts and AR's."""
    pairs = paired(rows, ar_rows)
    if not pairs:
        return {"prompts": 0}
    rows = [row for row, _ in pairs]
    new, rounds = sum(r.new_tokens for r in rows), sum(len(r.rounds) for r in rows)
    low, high = bootstrap(pairs, speedup)
    acceptance_low, acceptance_high = bootstrap(rows, acceptance)
    speeds = [ar.tokens_per_second for _, ar in pairs]
    equal = [r.output_equal for r in rows]
    ties = [r.ties for r in rows if r.ties is not None]
    drafted = [r.drafted for r in rows]
    return {
        "prompts": len(rows),
        "new_tokens": new,
        "drafted": None if None in drafted else sum(drafted),
        "accepted": sum(r.accepted for r in rows),
        "acceptance_rate": acceptance(rows),
        "acceptance_low": acceptance_low,
        "acceptance_high": acceptance_high,
        "acceptance_rate_no_loops": acceptance(rows, clean=True),
        "mean_accepted_length": new / rounds,
        "ttft_s": median(r.ttft_s for r in rows),
        "tokens_per_second": median(r.tokens_per_second for r in rows),
        "ar_tokens_per_second": median(speeds),
        "ar_variation": stdev(speeds) / mean(speeds) if len(speeds) > 1 else None,
        "speedup": speedup(pairs),
        "speedup_low": low,
        "speedup_high": high,
        "speedup_no_loops": speedup(pairs, clean=True),
        "loop_rate": sum(r.loop_rate * r.new_tokens for r in rows) / new,
        "output_equal": False if False in equal else None if None in equal else True,
        "ties": sum(ties) if ties else None,
        **{name: _largest(rows, name) for name, figure in figures_of(Prompt).items() if figure.largest},
    }


def speedup(pairs: Sequence[Pair], clean: bool = False) -> float | None:
    """Median speed over AR's median speed; `clean` counts rounds outside loops only, of both."""
    speeds = [(speed(row, clean), speed(ar, clean)) for row, ar in pairs]
    speeds = [(ours, theirs) for ours, theirs in speeds if ours is not None and theirs is not None]
    return median(ours for ours, _ in speeds) / median(theirs for _, theirs in speeds) if speeds else None


def speed(row: Prompt, clean: bool) -> float | None:
    """Decode tokens per second of one prompt."""
    if not clean:
        return row.tokens_per_second
    outside = [(tokens, us) for tokens, _, _, us, looped in row.rounds if not looped]
    seconds = sum(us for _, us in outside) / 1e6
    return sum(tokens for tokens, _ in outside) / seconds if seconds else None


def acceptance(rows: Sequence[Prompt], clean: bool = False) -> float | None:
    """Accepted over drafted, pooled over prompts; None where nothing was drafted or a tool does not report it."""
    if any(r.drafted is None for r in rows):
        return None
    rounds = [r for row in rows for r in row.rounds if not (clean and r[4])]
    drafted = sum(r[1] for r in rounds)
    return sum(r[2] for r in rounds) / drafted if drafted else None


def _largest(rows: Sequence[Prompt], name: str) -> int | None:
    return max((v for r in rows if (v := getattr(r, name)) is not None), default=None)


def seal(run: Run, rows: Sequence[Prompt]) -> str:
    """Digest of a cell as it was measured. A row that was edited later no longer fits its own."""

    def plain(row, without: set[str]) -> dict:
        return {k: v for k, v in row.model_dump(mode="json").items() if k not in without and v is not None}

    return digest([plain(run, UNSEALED), *(plain(row, UNSEALED_PROMPT) for row in rows)])[:SEAL_DIGITS]


def best(runs: Sequence[Run], of: Callable[[Run], tuple]) -> list[Run]:
    """The fastest valid cell of each group that `of` names, in the order given."""
    top: dict[tuple, Run] = {}
    for run in runs:
        if run.valid and run.speedup is not None and run.speedup > getattr(top.get(of(run)), "speedup", 0.0):
            top[of(run)] = run
    return [run for run in runs if any(run is t for t in top.values())]
