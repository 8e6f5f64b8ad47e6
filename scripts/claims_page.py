"""The page docs/claims.md: what the shipped pair shows beside speed, every number of it from docs/claims.tar.gz."""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from result_pages import as_page, rate

from bdcli.base.statistics import bootstrap
from bdcli.bench.claims import (
    Text,
    Worth,
    acceptance,
    by_document,
    clean_tokens,
    mean_worth,
    measure_fall,
    read_measurement,
    select,
)
from bdcli.results.tables import markdown

NAMES = {"books": "books", "qmsum": "meetings (QMSum)", "lwm": "NarrativeQA"}
DRAFTERS = {"drafter": "shipped", "naive": "naive"}
OURS, NAIVE = {"drafter": "drafter"}, {"drafter": "naive"}
SMALL, LARGE, FULL = 256, 2048, "full"


def read_archive(path: Path) -> tuple[list[Text], list[Worth]]:
    """The texts and the losses that `scripts/claims.py` measured, kept in a tar."""
    with tempfile.TemporaryDirectory() as folder, tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
        return read_measurement(Path(folder))


def claims_page(texts: Sequence[Text], worth: Sequence[Worth]) -> str:
    clean = clean_tokens(texts)
    parts = [
        "# Claims: what this pair shows beside speed",
        "Written by `scripts/results.py render` from `docs/claims.tar.gz`; a test compares the two. "
        "`scripts/claims.py` measures it, and its command `show` prints every comparison for every data set. Words "
        "are defined in the [glossary](glossary.md).",
        "Real decoding with the shipped pair, five tokens drafted a round, on held-out text of three data sets, "
        f"greedily and at temperature 1: {len(texts)} texts, {sum(t.tokens for t in texts)} new tokens, "
        f"{sum(t.clean for t in texts)} of them outside loops, at least {min(clean.values())} in each cell. All "
        "figures are outside loops. A bound is one-sided, 95 %, over documents.",
        *_budgets(texts),
        *_contexts(texts),
        *_worth(worth),
        *_rival(texts),
        "## Acceptance of every cell",
        "*shipped* is the pair's drafter; *naive* was trained on its full cache only, as long as the shipped one.",
        markdown(*_cells(texts)),
        "Commands, machines and dates: [the claims](log/2026-11-26-claims-all.md), [what the context is "
        "worth](log/2026-11-26-context-40.md), [the naive drafter](log/2026-11-26-rival-full.md) and [a correction "
        "of its figures](log/2026-11-26-same-prompts.md). Why 256 entries stay behind a full cache at 4K: [a later "
        "measurement](log/2026-11-26-why-256-behind.md).",
    ]
    return as_page(parts)


def _change(texts: Sequence[Text], first: dict, second: dict, temperature: float) -> tuple[str, str]:
    """By how many points `second` accepts more than `first`, and the lower bound of that."""
    found = measure_fall(select(texts, temperature=temperature), "", first, second, None)
    return f"{-100 * found.value:+.1f}", f"{-100 * found.upper:+.1f}"


def _rows(texts: Sequence[Text], cases: Sequence[tuple[list[str], dict, dict]]) -> list[list[str]]:
    """A row a case that was measured: its words, then points and bound at each temperature."""
    rows = []
    for words, first, second in cases:
        row = list(words)
        for temperature in sorted({t.temperature for t in texts}):
            here = {(t.drafter, t.context, t.budget) for t in texts if t.temperature == temperature}
            known = all((side["drafter"], side["context"], side["budget"]) in here for side in (first, second))
            row += _change(texts, first, second, temperature) if known else ("", "")
        rows.append(row)
    return rows


HEAD = ["greedy", "lower bound", "temperature 1", "lower bound"]


def _budgets(texts: Sequence[Text]) -> list[str]:
    contexts = sorted({t.context for t in texts})
    cases = [
        ([f"{c // 1024}k", str(large)], OURS | {"context": c, "budget": large}, OURS | {"context": c, "budget": SMALL})
        for large in (FULL, LARGE)
        for c in contexts
    ]
    return [
        "## One drafter, any budget",
        f"By how many points acceptance at {SMALL} entries is above that with a larger cache, over all data sets. At "
        f"4K {SMALL} entries accept what the full cache does; {LARGE} entries accept one to two points more. The "
        "full cache was trained on 4,096 tokens and loses beyond them: at 8K and 16K it is a drafter without a "
        "budget that has not seen such lengths.",
        markdown(["context", f"{SMALL} compared with", *HEAD], _rows(texts, cases)),
    ]


def _contexts(texts: Sequence[Text]) -> list[str]:
    near, far = min(t.context for t in texts), max(t.context for t in texts)
    case = [f"{far // 1024}k", f"{near // 1024}k"], *(OURS | {"context": c, "budget": SMALL} for c in (near, far))
    return [
        "## As much after 16K as after 4K",
        f"By how many points acceptance at {SMALL} entries after a long prompt is above that after a short one, over "
        "all data sets.",
        markdown(["context", "compared with", *HEAD], _rows(texts, [case])),
    ]


def _worth(worth: Sequence[Worth]) -> list[str]:
    rows = []
    for name in dict.fromkeys(w.dataset for w in worth):
        mine = [w for w in worth if w.dataset == name]
        documents = by_document(mine)
        lower = bootstrap(documents, mean_worth, tail=0.05)[0]
        losses = f"{fmean(w.loss for w in mine):.3f}", f"{fmean(w.short_loss for w in mine):.3f}"
        rows.append([NAMES[name], str(len(mine)), *losses, f"{mean_worth(documents):.3f}", f"{lower:.3f}"])
    return [
        "## The target uses its context",
        f"The target's loss over the ends of prompts of {worth[0].context} tokens, in nats a token, with all of the "
        "prompt and given only the last 256 tokens. A drafter of a target that ignores its context would be flat "
        "for nothing.",
        markdown(["data set", "prompts", "whole prompt", "last 256", "context is worth", "lower bound"], rows),
    ]


def _rival(texts: Sequence[Text]) -> list[str]:
    contexts = sorted({t.context for t in texts if t.drafter == "naive"})
    near, far = contexts[0], contexts[-1]
    cases = []
    for c in contexts:
        at, whole = f"{c // 1024}k", NAIVE | {"context": c, "budget": FULL}
        small = {"context": c, "budget": SMALL}
        cases.append(([f"naive, {SMALL}, {at}", f"naive, full, {at}"], whole, NAIVE | small))
        cases.append(([f"shipped, {SMALL}, {at}", f"naive, full, {at}"], whole, OURS | small))
    for role, name in ((NAIVE, "naive"), (OURS, "shipped")):
        words = [f"{name}, {SMALL}, {far // 1024}k", f"{name}, {SMALL}, {near // 1024}k"]
        cases.append((words, *(role | {"context": c, "budget": SMALL} for c in (near, far))))
    rows = [[*row[:2], *row[4:]] for row in _rows(texts, cases)]
    return [
        "## Not shown by this pair",
        "What distilling under budgets buys. A naive drafter, trained on its full cache alone, loses little when it "
        f"is read at {SMALL} entries. At 4K its full cache is ahead of the shipped drafter at {SMALL}. At 16K its "
        "full cache has not seen such lengths. Points over all data sets:",
        markdown(["drafter, entries, context", "compared with", *HEAD[2:]], rows),
    ]


def _cells(texts: Sequence[Text]) -> tuple[list[str], list[list[str]]]:
    contexts = sorted({t.context for t in texts})
    head = ["data set", "temperature", "drafter", "budget", *(f"{c // 1024}k" for c in contexts)]
    keys = dict.fromkeys((t.dataset, t.temperature, t.drafter, t.budget) for t in texts)
    rows = []
    for dataset, temperature, drafter, budget in sorted(keys, key=str):
        of = {"dataset": dataset, "temperature": temperature, "drafter": drafter, "budget": budget}
        rates = [rate(acceptance(texts, **of, context=c)) for c in contexts]
        rows.append([NAMES[dataset], f"{temperature:g}", DRAFTERS[drafter], str(budget), *rates])
    return head, rows
