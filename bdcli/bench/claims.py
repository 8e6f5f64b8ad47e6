"""Claims about acceptance: does it hold under a small budget and at a long context? Read from texts that were decoded.

`bdcli.bench.claims_texts` decodes them. Two cells are compared after the prompts that both have. Bounds are one-sided
95 % percentile bootstraps over documents, whose prompts are drawn together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from bdcli.base.errors import UserError
from bdcli.base.files import write_file
from bdcli.base.statistics import bootstrap
from bdcli.train.held_out import SHORT_TOKENS

TEXTS_FILE, WORTH_FILE = "prompts.jsonl", "worth.json"
MAX_BUDGET_FALL = 0.02  # of acceptance, from the full cache or the largest budget to the smallest
MAX_CONTEXT_FALL = 0.03  # from the shortest context to the longest
MIN_NAIVE_FALL = 0.05  # below it a naive drafter loses so little that the pair does not test the claim
MIN_CONTEXT_WORTH = 0.05  # nats a token
MIN_DOCUMENTS = 5  # for a bound
BOUND_TAIL = 0.05  # left out at one end


@dataclass(frozen=True)
class Text:
    """One decoding. Counts of drafts are of rounds that begin outside loops, `clean` are tokens outside them."""

    dataset: str
    source: str
    index: int
    context: int
    temperature: float
    drafter: str
    budget: int | str
    tokens: int
    clean: int
    drafted: int
    accepted: int
    rounds: int
    drafted_in_all: int
    accepted_in_all: int

    @property
    def cell(self) -> tuple:
        return self.dataset, self.context, self.temperature, self.drafter, self.budget


@dataclass(frozen=True)
class Worth:
    """The target's loss at the end of one prompt, nats a token over its last `tokens`, with and without the context."""

    dataset: str
    source: str
    context: int
    tokens: int
    loss: float
    short_loss: float


# -- files


def open_texts(path: Path, key: str, drafters: dict[str, str]) -> list[Text]:
    """Texts decoded so far under `key`. New drafters join the file's head; a line cut short by a kill is removed.

    `drafters`: fingerprint of each role. Raises UserError on texts of other models or settings.
    """
    head, texts = read_texts(path) if path.exists() else ({"key": key}, [])
    known = head.get("drafters", {}) | drafters
    if head["key"] != key or not head.get("drafters", {}).items() <= known.items():
        raise UserError(f"{path} was measured with other models, texts or settings", "Give another --out")
    lines = ({"key": key, "drafters": known}, *map(asdict, texts))
    write_file(path, "".join(json.dumps(line) + "\n" for line in lines))
    return texts


def append_text(path: Path, text: Text) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(text)) + "\n")


def read_texts(path: Path) -> tuple[dict, list[Text]]:
    """The head of the file, and the texts of its whole lines."""
    head, *lines = path.read_text("utf-8").splitlines(keepends=True)
    return json.loads(head), [Text(**json.loads(line)) for line in lines if line.endswith("\n")]


def read_worth(path: Path) -> dict[str, dict[str, list[dict]]]:
    """{key: {data set: rows of `Worth`}} of the file, empty where there is none."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def read_measurement(folder: Path) -> tuple[list[Text], list[Worth]]:
    """What the folder holds so far. Raises UserError where that is nothing."""
    if not (folder / TEXTS_FILE).exists():
        hint = "Start one with: python scripts/claims.py run --on NAME=PLACE"
        raise UserError(f"{folder} holds no measurement", hint)
    head, texts = read_texts(folder / TEXTS_FILE)
    rows = read_worth(folder / WORTH_FILE).get(head["key"], {})
    return texts, [Worth(**row) for dataset in rows.values() for row in dataset]


# -- statistics


def clean_tokens(texts: Sequence[Text]) -> dict[tuple, int]:
    """Tokens outside loops of each cell."""
    clean: dict[tuple, int] = {}
    for text in texts:
        clean[text.cell] = clean.get(text.cell, 0) + text.clean
    return clean


def select(texts: Sequence[Text], **values) -> list[Text]:
    """The texts with these values."""
    return [text for text in texts if all(getattr(text, name) == value for name, value in values.items())]


def acceptance(texts: Sequence[Text], **values) -> float | None:
    """Accepted over drafted in rounds outside loops, of texts with these values; None where nothing was drafted."""
    chosen = select(texts, **values)
    drafted = sum(text.drafted for text in chosen)
    return sum(text.accepted for text in chosen) / drafted if drafted else None


def by_document(measured: Sequence[Text | Worth]) -> list[list]:
    """Texts or worths grouped by the document that their prompts were cut from."""
    groups: dict[tuple[str, str], list] = {}
    for one in measured:
        groups.setdefault((one.dataset, one.source.rpartition("@")[0]), []).append(one)
    return list(groups.values())


def verdict(value: float, upper: float | None, limit: float) -> str:
    """Of a value that may be `limit` at most, and its upper bound if there is one."""
    if upper is not None and upper <= limit:
        return "holds"
    if value > limit:
        return "does not hold"
    return "" if upper is None else "not shown"


@dataclass(frozen=True)
class Fall:
    """How far acceptance falls from one cell to another, with its one-sided 95 % upper bound."""

    what: str
    value: float | None
    upper: float | None
    limit: float | None
    clean: int  # least clean tokens of a cell that it compares

    def verdict(self, enough: int) -> str:
        """`enough`: clean tokens that a cell needs."""
        if self.limit is None or self.upper is None:
            return ""
        if self.clean < enough:
            return "too few tokens"
        return verdict(self.value, self.upper, self.limit)


def measure_fall(texts: Sequence[Text], what: str, high: dict, low: dict, limit: float | None) -> Fall:
    """acceptance(high) - acceptance(low) after the prompts that both have, bounded by drawing documents."""
    sides = [select(texts, **side) for side in (high, low)]
    common = set.intersection(*({(t.dataset, t.index) for t in side} for side in sides))
    paired = [t for side in sides for t in side if (t.dataset, t.index) in common]
    documents, clean = by_document(paired), clean_tokens(paired)

    def difference(drawn: Sequence[list[Text]]) -> float | None:
        flat = [text for document in drawn for text in document]
        a, b = acceptance(flat, **high), acceptance(flat, **low)
        return None if a is None or b is None else a - b

    upper = bootstrap(documents, difference, tail=BOUND_TAIL)[1] if len(documents) >= MIN_DOCUMENTS else None
    return Fall(what, difference(documents), upper, limit, min(clean.values(), default=0))


def claimed_falls(texts: Sequence[Text]) -> Iterator[Fall]:
    """The falls that the claims bound, on texts of one data set (or of all) at one temperature."""
    contexts, budgets = sorted({t.context for t in texts}), sorted({t.budget for t in texts if t.budget != "full"})
    least, most, ours, naive = budgets[0], budgets[-1], {"drafter": "drafter"}, {"drafter": "naive"}
    for large in ["full", *([most] if most > least else [])]:
        for c in contexts:
            high, low = ours | {"context": c, "budget": large}, ours | {"context": c, "budget": least}
            yield measure_fall(texts, f"{large} - {least} at {c}", high, low, MAX_BUDGET_FALL)
    near, far = (ours | {"context": c, "budget": least} for c in (contexts[0], contexts[-1]))
    yield measure_fall(texts, f"{contexts[0]} - {contexts[-1]} at budget {least}", near, far, MAX_CONTEXT_FALL)
    for c in contexts if select(texts, **naive) else ():
        high, low = naive | {"context": c, "budget": "full"}, ours | {"context": c, "budget": least}
        yield measure_fall(texts, f"naive full - ours {least} at {c}", high, low, 0.0)
        yield measure_fall(texts, f"naive full - naive {least} at {c}", high, low | naive, None)


def mean_worth(documents: Sequence[Sequence[Worth]]) -> float:
    """Nats a token that the context is worth over the prompts of these documents."""
    return fmean(w.short_loss - w.loss for document in documents for w in document)


# -- report, in Markdown


def report(texts: Sequence[Text], worth: Sequence[Worth], enough: int) -> str:
    """Acceptance of every cell, the claims, what the context is worth. `enough`: clean tokens that a cell needs."""
    if not texts:
        return "Nothing is measured yet."
    return "\n".join([*_cell_rows(texts, enough), *_claim_rows(texts, enough), *worth_rows(worth)])


def _cell_rows(texts: Sequence[Text], enough: int) -> Iterator[str]:
    """Acceptance outside loops, contexts side by side."""
    contexts, clean = sorted({t.context for t in texts}), clean_tokens(texts)
    yield "| data set | temperature | drafter | budget |" + "".join(f" {c} |" for c in contexts) + " least clean |"
    yield "| --- | ---: | --- | ---: |" + " ---: |" * (len(contexts) + 1)
    rows = dict.fromkeys((t.dataset, t.temperature, t.drafter, t.budget) for t in texts)
    for dataset, temperature, drafter, budget in sorted(rows, key=str):
        values = {"dataset": dataset, "temperature": temperature, "drafter": drafter, "budget": budget}
        rates = [_percent(acceptance(texts, **values, context=c)) for c in contexts]
        cells = [(dataset, c, temperature, drafter, budget) for c in contexts]
        least = min(clean[cell] for cell in cells if cell in clean)
        short = "" if least >= enough else " (too few)"
        yield f"| {dataset} | {temperature:g} | {drafter} | {budget} | {' | '.join(rates)} | {least}{short} |"


def _claim_rows(texts: Sequence[Text], enough: int) -> Iterator[str]:
    """Every fall with its bound and verdict, and whether a naive drafter tests the claim at all."""
    yield ""
    yield "| data set | temperature | fall of acceptance | points | upper bound | limit | |"
    yield "| --- | ---: | --- | ---: | ---: | ---: | --- |"
    tested = False
    for temperature in sorted({t.temperature for t in texts}):
        for name, mine in _by_dataset(select(texts, temperature=temperature), texts):
            for fall in claimed_falls(mine):
                if fall.value is None:
                    continue
                limit = "" if fall.limit is None else _points(fall.limit)
                figures = [fall.what, _points(fall.value), _points(fall.upper), limit, fall.verdict(enough)]
                yield "| " + " | ".join([name, f"{temperature:g}", *figures]) + " |"
                tested |= fall.limit is None and fall.value >= MIN_NAIVE_FALL
    if select(texts, drafter="naive") and not tested:
        yield ""
        yield (
            f"The naive drafter loses less than {100 * MIN_NAIVE_FALL:.0f} points when it is read sparsely: this "
            "pair does not yet test the claim."
        )


def worth_rows(measured: Sequence[Worth]) -> Iterator[str]:
    """The target's loss at the ends of prompts, and how much higher it is given the last `SHORT_TOKENS` alone."""
    yield ""
    ends = f"loss of their ends | given the last {SHORT_TOKENS}"
    yield f"| data set | context | prompts | {ends} | context is worth | lower bound | limit | |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
    for name, mine in _by_dataset(measured, measured):
        documents = by_document(mine)
        loss, short, gain = fmean(w.loss for w in mine), fmean(w.short_loss for w in mine), mean_worth(documents)
        lower = bootstrap(documents, mean_worth, tail=BOUND_TAIL)[0] if len(documents) >= MIN_DOCUMENTS else None
        row = [name, str(mine[0].context), str(len(mine)), f"{loss:.3f}", f"{short:.3f}"]
        row += [f"{gain:+.3f}", "" if lower is None else f"{lower:+.3f}", f"{MIN_CONTEXT_WORTH:.2f}"]
        row.append(verdict(-gain, None if lower is None else -lower, -MIN_CONTEXT_WORTH))
        yield "| " + " | ".join(row) + " |"


def _by_dataset(measured: Sequence, named: Sequence) -> Iterator[tuple[str, list]]:
    """(name, rows) of every data set of `named`, and of all together where there are several."""
    names = list(dict.fromkeys(one.dataset for one in named))
    for name in names:
        yield name, [one for one in measured if one.dataset == name]
    if len(names) > 1:
        yield "all", list(measured)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _points(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.1f}"
