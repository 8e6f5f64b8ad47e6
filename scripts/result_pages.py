"""The committed pages of measured results, every number of them from stored cells: README's table and docs/results*.md.

Pure functions of rows of the store; `scripts/results.py` measures, stores and writes.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Callable

from bdcli.bench import paper
from bdcli.config.bench import PEER_METHODS
from bdcli.results.query import faster_rivals, refusals
from bdcli.results.schema import Run
from bdcli.results.tables import markdown, side_by_side

WIDTH = 120  # characters of a line of prose
README_ARMS = {"bd-512": "512 entries", "full": "everything"}  # arm and what its drafter keeps
WRITTEN = "Written by `scripts/results.py render` from `docs/results.db.gz`; a test compares the two."
Columns = dict[str, Callable[[Run], str]]


def pages(main: list[Run], repeats: list[Run], published: list[Run]) -> dict[str, str]:
    """The text of every page by its name in docs/."""
    return {
        "results.md": results_page(main, repeats),
        "results-cells.md": cells_page(main),
        "results-memory.md": memory_page(main),
        "results-paper.md": paper_page(published),
    }


# -- README


def readme_table(main: list[Run]) -> str:
    """Two rows a context: the drafter under a budget and with its full cache; then what it was measured on."""
    columns: Columns = {
        "context": _context,
        "drafter keeps": lambda r: README_ARMS[r.arm],
        "plain tok/s": lambda r: f"{r.ar_tokens_per_second:.1f}",
        "drafting tok/s": lambda r: f"{r.tokens_per_second:.1f}",
        "speedup": _speedup,
        "95 % interval": _interval,
        "outside loops": _clean_speedup,
        "drafter KV": _drafter_kv,
    }
    rows = [r for c in _contexts(main) for arm in README_ARMS for r in main if (r.arm, r.context) == (arm, c)]
    lines = ["| " + " | ".join(columns) + " |", "|" + " ---: |" * len(columns)]
    for run in rows:
        shown = [show(run) for show in columns.values()] if run.valid else [_context(run), run.arm, *["invalid"] * 6]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n\n" + _wrapped(f"{set_up(main)} {_loops_line(rows)} {_transformers_line(main)}")


def set_up(runs: list[Run]) -> str:
    """Prompts, settings, machine, versions, commit."""
    run = runs[0]
    datasets = ", ".join(dict.fromkeys(r.dataset for r in runs))
    packages = ", ".join(f"{name} {run.versions[name]}" for name in ("torch", "transformers") if name in run.versions)
    return (
        f"{run.prompts} prompts of {datasets}, {run.config['max_new_tokens']} new tokens each, {run.dtype}, "
        f"{'greedy' if run.temperature == 0 else f'temperature {run.temperature}'}. "
        f"{run.machine}; {packages}; commit {run.git_revision}."
    )


def _loops_line(rows: list[Run]) -> str:
    """What the column `outside loops` leaves out."""
    rates = [r.loop_rate for r in rows]
    span = f"{min(rates):.0%} to {max(rates):.0%}"
    return f"Of the new tokens {span} repeat earlier text (loops), which is easy to draft."


def _transformers_line(main: list[Run]) -> str:
    """The fastest that transformers was with the same weights, by context."""
    found = [(c, fastest(peers)) for c in _contexts(main) if (peers := counted(main, c)[1])]
    if not found:
        return ""
    speeds = ", ".join(f"{run.tokens_per_second:.1f} at {context // 1024}k" for context, run in found)
    return f"The fastest method of transformers with the same weights, in tok/s: {speeds}."


# -- docs/results.md


def results_page(main: list[Run], repeats: list[Run]) -> str:
    """Speed of every arm, side by side."""
    parts = [
        "# Results",
        f"{WRITTEN} Words are defined in the [glossary](glossary.md). Beside this page: "
        "[acceptance and speed of every cell](results-cells.md), [memory of every cell](results-memory.md), "
        "[the paper's protocol](results-paper.md), [what was measured beside speed](claims.md).",
        set_up(main),
        _tolerance(main),
        "## Side by side",
        "Speedup over plain decoding (95 % interval), then tokens per second. `ar` is plain decoding; `bd-N` is the "
        "drafter with a budget of N entries, `full` with its full cache, `official` with the paper's selection, and "
        "`lookup` drafts by n-grams of the text. Arms named -g5 and -g8 draft that many tokens a round; the others "
        "choose the number while they run. Peers (hf-) run the same weights, prompts and stop rules in transformers, "
        "in the same dtype or, where named -fp32, in fp32; hf-static with a static cache, the others with the dynamic "
        "one they come with.",
        markdown(*side_by_side(main)),
        *_against_transformers(main),
        "![acceptance, speed and memory](results.svg)",
        "## Where we are beaten",
        "By data set and context, every arm faster than our fastest budgeted one.",
        "\n".join(f"* {line}" for line in faster_rivals(main)) or "Nowhere in this matrix.",
        *_repeats(repeats),
    ]
    return as_page(parts)


def _tolerance(main: list[Run]) -> str:
    ar = [r for r in main if r.method == "ar"]
    unsteady = ", ".join(f"{r.ar_variation:.1%} at {r.context // 1024}k" for r in ar)
    spread = max(r.ar_variation for r in ar)
    return (
        f"Tolerance: the speed of plain decoding over the prompts of a cell varies by {unsteady} (standard deviation / "
        f"mean), so ratios closer than about {2 * spread:.0%} are within the noise; intervals are 95 % bootstraps over "
        "prompts. In bf16 a text counts as equal when every differing choice lies within four times our engine's logit "
        "error (none where its rows do not depend on each other). Peers round differently, so their text may differ "
        "from ours; that is shown and is not a fault."
    )


def _against_transformers(main: list[Run]) -> list[str]:
    """Our plain decoding and our fastest arm beside theirs, as ratios of tokens per second."""
    head = ["", "plain over hf-ar", "plain over hf-static", "our fastest arm", "their fastest arm", "ours over theirs"]
    body = []
    for context in _contexts(main):
        own, peers = counted(main, context)
        if not peers:
            continue
        ar = next(r for r in own if r.method == "ar").tokens_per_second
        ours, theirs = fastest(own), fastest(peers)
        over = [
            ", ".join(f"{ar / r.tokens_per_second:.1f}× {r.dtype}" for r in peers if r.method == method)
            for method in ("hf-ar", "hf-static")
        ]
        both = [f"{r.arm} {r.tokens_per_second:.1f}" for r in (ours, theirs)]
        body.append([f"{context // 1024}k", *over, *both, f"{ours.tokens_per_second / theirs.tokens_per_second:.1f}×"])
    explained = (
        "Plain decoding in our engine over plain decoding in transformers, with the cache it comes with (hf-ar) and "
        "with a static one (hf-static); then the fastest arm of each side, theirs of any dtype."
    )
    return ["## Against transformers", explained, markdown(head, body)] if body else []


def _repeats(repeats: list[Run]) -> list[str]:
    """The same cell several times, and whether its intervals overlap."""
    cells = [r for r in repeats if r.method != "ar"]
    if not cells:
        return []
    overlap = max(r.speedup_low for r in cells) <= min(r.speedup_high for r in cells)
    shown = "; ".join(f"{_speedup(r)} ({_interval(r)})" for r in cells)
    first = cells[0]
    return [
        "## The same cell again",
        f"{first.arm} at {first.context // 1024}k, measured {len(cells)} times: {shown}. "
        f"The intervals {'overlap' if overlap else 'do NOT overlap'}.",
    ]


# -- docs/results-cells.md and docs/results-memory.md


def cells_page(main: list[Run]) -> str:
    """Acceptance and speed of every cell."""
    columns: Columns = {
        "context": _context,
        "arm": lambda r: r.arm,
        "acceptance": lambda r: rate(r.acceptance_rate),
        "clean": lambda r: rate(r.acceptance_rate_no_loops),
        "loops": lambda r: f"{r.loop_rate:.0%}",
        "mean length": lambda r: f"{r.mean_accepted_length:.2f}",
        "tok/s": lambda r: f"{r.tokens_per_second:.1f}",
        "speedup": _speedup,
        "95 %": _interval,
        "clean speedup": _clean_speedup,
    }
    parts = [
        "# Results: acceptance and speed",
        f"{WRITTEN} The arms are explained in [results](results.md).",
        set_up(main),
        "*loops* is the share of new tokens that repeat an earlier 8-gram; *clean* figures count rounds that begin "
        "outside such repeats; *mean length* is tokens per target forward.",
        markdown(list(columns), _rows(columns, main)),
        _refused(main),
    ]
    return as_page(parts)


def memory_page(main: list[Run]) -> str:
    """Time to first token, memory and equality of every cell."""
    columns: Columns = {
        "context": _context,
        "arm": lambda r: r.arm,
        "first token": lambda r: f"{r.ttft_s:.2f} s",
        "memory": lambda r: f"{r.peak_memory_bytes / 1e6:.0f} MB",
        "drafter KV": _drafter_kv,
        "entries": lambda r: str(r.max_drafter_entries or ""),
        "equal": lambda r: ("yes" if r.output_equal else "NO") + (f", {r.ties} ties" if r.ties else ""),
    }
    parts = [
        "# Results: memory",
        f"{WRITTEN} The arms are explained in [results](results.md).",
        set_up(main),
        "*memory* is weights, the target's KV cache and what decoding a prompt took beside them; *entries* is the "
        "largest number of KV entries per layer and head that the drafter held; *equal* compares the text with plain "
        "decoding.",
        markdown(list(columns), _rows(columns, main)),
    ]
    return as_page(parts)


def _rows(columns: Columns, main: list[Run]) -> list[list[str]]:
    return [[show(r) for show in columns.values()] for r in main if r.speedup]


def _refused(main: list[Run]) -> str:
    """The cells whose figures do not count, with the reasons."""
    if not refusals(main):
        return ""
    bad = [r for r in main if not r.valid]
    return "Refused:\n\n" + "\n".join(f"* {r.dataset} at {r.context}, {r.arm}: {r.invalid_reason}" for r in bad)


# -- docs/results-paper.md


def paper_page(published: list[Run]) -> str:
    """Our figures under the paper's protocol beside its own."""
    head = [
        "# Results: the paper's protocol",
        f"{WRITTEN} The paper is BudgetDraft (arXiv 2606.00144); `--protocol paper` of "
        "[bdcli bench](cli/measure.md#bdcli-bench) measures as it did.",
    ]
    if not published:
        return as_page([*head, "Nothing is measured yet."])
    run = published[0]
    about = (
        f"Greedy, {run.config['max_new_tokens']} new tokens, the first prompt a warm-up, and for every cell the "
        "fastest draft length γ of a grid. The paper's grids are 5 to 60, 5 to 30 and 5 to 40; ours are below the "
        f"table. {run.prompts} prompts a cell counted here, 9 there; commit {run.git_revision}, with the pair that "
        "shipped then."
    )
    return as_page([*head, about, "\n".join(paper.lines(published)), "Draft lengths tried:", _grids(published)])


def _grids(published: list[Run]) -> str:
    tried: dict[tuple[int, int], set[int]] = {}
    names = " ".join(name for r in published for name in r.config["beside"])
    for budget, gamma, context in re.findall(r"(?:b(\d+)-)?g(\d+)-at-(\d+)", names):
        tried.setdefault((int(budget or paper.BUDGET), int(context)), set()).add(int(gamma))
    return "\n".join(
        f"* {_span(sorted(gammas))} at budget {budget} and {context // 1024}k"
        for (budget, context), gammas in sorted(tried.items(), reverse=True)
    )


def _span(numbers: list[int]) -> str:
    """As `5 to 60 by 5` where the steps are equal, else all of them."""
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    return f"{numbers[0]} to {numbers[-1]} by {steps.pop()}" if len(steps) == 1 else ", ".join(map(str, numbers))


# -- shared


def counted(main: list[Run], context: int) -> tuple[list[Run], list[Run]]:
    """Our cells and transformers' of a context, those whose figures count."""
    here = [r for r in main if r.context == context and r.valid and r.tokens_per_second]
    return [r for r in here if r.method not in PEER_METHODS], [r for r in here if r.method in PEER_METHODS]


def fastest(runs: list[Run]) -> Run:
    return max(runs, key=lambda r: r.tokens_per_second)


def as_page(parts: list[str]) -> str:
    """A page of headings, tables and paragraphs of any length."""
    return "\n\n".join(_wrapped(part) for part in parts if part) + "\n"


def _wrapped(part: str) -> str:
    """Lines of prose at most WIDTH long; lines of tables, headings and pictures as they are."""
    return "\n".join(
        line
        if line[:1] in ("|", "#", "!", "")
        else textwrap.fill(line, WIDTH, break_on_hyphens=False, break_long_words=False)
        for line in part.split("\n")
    )


def _contexts(main: list[Run]) -> list[int]:
    return sorted({r.context for r in main})


def _context(run: Run) -> str:
    return f"{run.context // 1024}k"


def _speedup(run: Run) -> str:
    return f"{run.speedup:.2f}×"


def _clean_speedup(run: Run) -> str:
    return "" if run.speedup_no_loops is None else f"{run.speedup_no_loops:.2f}×"


def _interval(run: Run) -> str:
    return f"{run.speedup_low:.2f}–{run.speedup_high:.2f}"


def _drafter_kv(run: Run) -> str:
    return "" if not run.drafter_kv_bytes else f"{run.drafter_kv_bytes / 1e6:.2f} MB"


def rate(value: float | None) -> str:
    """A share as a percentage; empty where there is none."""
    return "" if value is None else f"{value:.1%}"
