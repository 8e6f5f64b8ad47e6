"""Does acceptance hold under a small budget and a long context? Real decoding at a fixed γ, outside loops.

    python scripts/claims.py run --on books=FOLDER --on qmsum=FILE.jsonl --on lwm=FILE.jsonl --naive DIR
    python scripts/claims.py show runs/claims

Prompts are cut from held-out documents as running text; those of all contexts end at the same token. Every data set is
decoded, greedily and at temperature 1, with every drafter and budget, until each cell has enough tokens outside loops.
`naive` is a drafter trained on its full cache only. Two cells are compared after the prompts that both have. Bounds
are one-sided 95 % percentile bootstraps over documents, whose prompts are drawn together. Every text is a line of
prompts.jsonl as soon as it is written, with --jobs as soon as those after the same prompt are. The same command goes on
after a stop, and one with a naive drafter, a budget or a temperature more adds its texts.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer

from bdcli.base.console import note, phases, run_script
from bdcli.base.devices import product_dtype
from bdcli.base.errors import UserError
from bdcli.base.files import digest, write_file
from bdcli.base.progress import Progress
from bdcli.base.statistics import bootstrap
from bdcli.config.decode import DecodeOptions, parse_budget, parse_context
from bdcli.data.samples import Sample, load_samples
from bdcli.data.sources import split_source
from bdcli.decode.pair import Pair, load_pair
from bdcli.decode.session import Session
from bdcli.model.checkpoint import fingerprint, load_model, resolve
from bdcli.results.metrics import RoundFigures, looped_tokens, mark_loops
from bdcli.speculation.draft_length import FixedGamma
from bdcli.speculation.speculator import Speculator
from bdcli.train.held_out import SHORT, window_losses

TEXTS, WORTH = "prompts.jsonl", "worth.json"
SMALL_LOSS, FAR_LOSS, NAIVE_GAP, CONTEXT_WORTH = 0.02, 0.03, 0.05, 0.05  # the claims
MIN_DOCUMENTS = 5  # below it there are no bounds
WORTH_PROMPTS = 40  # of a data set, for what its context is worth
WORTH_ROWS = 4  # tokens predicted together without a long context: they see 256 to 259 tokens

Arm = tuple[float, str, int | str]  # temperature, drafter, budget
Work = tuple[Sample, int, list[Arm]]  # a prompt, its context, what is to be decoded after it

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


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


@dataclass(frozen=True)
class Settings:
    """What the measurement depends on beside its texts and models."""

    contexts: tuple[int, ...]
    budgets: tuple[int | str, ...]
    temperatures: tuple[float, ...]
    gamma: int
    new_tokens: int
    prompts: int
    dtype: str


class Notes(Progress):
    """Shows notes alone."""

    note = staticmethod(note)


class Decoder:
    """The models, and the texts they write after a prompt."""

    def __init__(self, settings: Settings, models: dict[str, str]):
        self.s = settings
        self.base = DecodeOptions(target=models["target"], dtype=settings.dtype, baseline="off")
        self.pairs: dict[str, Pair] = {}
        for role in [r for r in ("drafter", "naive") if r in models]:
            self.pairs[role] = load_pair(DecodeOptions(**asdict(self.base) | {"drafter": models[role]}), Notes())
        self.pair = self.pairs["drafter"]

    def texts(self, sample: Sample, context: int, arms: Sequence[Arm]) -> Iterator[Text]:
        """Texts of the arms after one prompt, which the target reads once."""
        s, prompt = self.s, sample.prompt(context)
        common = asdict(self.base) | {"max_new_tokens": s.new_tokens, "gamma": s.gamma}
        target = Session(self.pair, DecodeOptions(**common)).target(len(prompt), s.gamma)
        target.prefill(prompt[:-1])
        for temperature, role, budget in arms:
            size = None if budget == "full" else budget
            options = DecodeOptions(**common | {"budget": size, "temperature": temperature})
            session = Session(self.pairs[role], options)
            target.rollback(len(prompt) - 1)
            drafter = session.drafter(len(prompt))
            engine = Speculator(target, drafter, session.sampling, sample.index, self.pair.target.device)
            engine.prefill(prompt, target_ready=True)
            done = engine.rounds(s.new_tokens, self.pair.eos, FixedGamma(s.gamma))
            rounds = [RoundFigures.of(r) for r in done]
            clean = [r for r in mark_loops(prompt, engine.new_tokens, rounds) if not r.looped]
            looped = looped_tokens(prompt, engine.new_tokens)
            yield Text(
                dataset=sample.dataset,
                source=sample.source,
                index=sample.index,
                context=context,
                temperature=temperature,
                drafter=role,
                budget=budget,
                tokens=len(looped),
                clean=len(looped) - sum(looped),
                drafted=sum(r.drafted for r in clean),
                accepted=sum(r.accepted for r in clean),
                rounds=len(rounds),
                drafted_in_all=sum(r.drafted for r in rounds),
                accepted_in_all=sum(r.accepted for r in rounds),
            )


def side_by_side(jobs: int, settings: Settings, models: dict[str, str], work: Iterator[Work]) -> Iterator[Text]:
    """The texts of `work`, decoded by that many processes that share the processors; in the order they are done in."""
    begin = settings, models, max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin_worker, begin) as pool:
        try:
            running = {pool.submit(_texts_of, *unit) for unit in islice(work, jobs)}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield from future.result()
                # drawn only now: whether there is enough depends on what came
                running |= {pool.submit(_texts_of, *unit) for unit in islice(work, len(done))}
        finally:
            pool.shutdown(cancel_futures=True)


_decoder: Decoder | None = None  # of a worker


def _begin_worker(settings: Settings, models: dict[str, str], threads: int) -> None:
    global _decoder
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    _decoder = Decoder(settings, models)


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


def _texts_of(*unit) -> list[Text]:
    return list(_decoder.texts(*unit))


class Measurement:
    """The texts in the folder `out`, and writing those that are missing."""

    def __init__(self, out: Path, settings: Settings, sources: Sequence[str], models: dict[str, str], jobs: int = 1):
        self.s, self.out, self.models, self.jobs = settings, out, models, jobs
        self.decoder = Decoder(settings, models)
        longest = max(settings.contexts)
        self.samples = {
            name: load_samples(self.decoder.pair.tokenizer, name, [place], settings.prompts, longest, asked=False)
            for name, place in map(split_source, sources)
        }
        ends = {name: [(s.source, s.before[-64:]) for s in samples] for name, samples in self.samples.items()}
        prints = {role: fingerprint(resolve(name, role_of(role))) for role, name in models.items()}
        # contexts, budgets, temperatures and a naive drafter may be added later: a text carries its own
        common = {k: v for k, v in asdict(settings).items() if k not in ("contexts", "budgets", "temperatures")}
        self.key = digest([common, longest, ends, prints.pop("target")])
        out.mkdir(parents=True, exist_ok=True)
        self.texts = begin_texts(out / TEXTS, {"key": self.key, "drafters": prints})

    @property
    def arms(self) -> list[tuple[str, int | str]]:
        return [(role, budget) for role in self.decoder.pairs for budget in self.s.budgets]

    def run(self, enough: int, progress: Callable[[str, int, int, str], None]) -> None:
        """Write texts until every cell has `enough` clean tokens, or there are no more prompts."""
        work = self.missing(enough)
        if self.jobs > 1:
            made = side_by_side(self.jobs, self.s, self.models, work)
        else:
            made = (text for unit in work for text in self.decoder.texts(*unit))
        for text in made:
            self.texts.append(text)
            with (self.out / TEXTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(text)) + "\n")
            progress("clean tokens", *self.done(enough), f"{text.dataset}, prompt {text.index + 1}")

    def missing(self, enough: int) -> Iterator[Work]:
        """What is to be decoded next, while it is: a data set and temperature ends when all its cells have enough."""
        have = {(*t.cell, t.index) for t in self.texts}
        for n in range(max(map(len, self.samples.values()))):
            for name in [name for name, samples in self.samples.items() if n < len(samples)]:
                open_ones = [t for t in self.s.temperatures if not self.filled(name, t, enough)]
                for context in self.s.contexts:
                    arms = [
                        (temperature, role, budget)
                        for temperature in open_ones
                        for role, budget in self.arms
                        if (name, context, temperature, role, budget, n) not in have
                    ]
                    if arms:
                        yield self.samples[name][n], context, arms

    def _cells(self, name: str, temperature: float) -> list[tuple]:
        return [(name, c, temperature, *arm) for c in self.s.contexts for arm in self.arms]

    def filled(self, name: str, temperature: float, enough: int) -> bool:
        """Every cell of a data set and temperature has `enough`."""
        clean = clean_tokens(self.texts)
        return all(clean.get(cell, 0) >= enough for cell in self._cells(name, temperature))

    def done(self, enough: int) -> tuple[int, int]:
        clean = clean_tokens(self.texts)
        cells = [cell for name in self.samples for t in self.s.temperatures for cell in self._cells(name, t)]
        return sum(min(enough, clean.get(cell, 0)) for cell in cells), enough * len(cells)

    def context_worth(self, progress: Callable[[str, int, int, str], None]) -> None:
        """The target's losses at the end of the first prompts of the longest context, once for each prompt."""
        path, longest = self.out / WORTH, max(self.s.contexts)
        found = json.loads(path.read_text("utf-8")) if path.exists() else {}
        known, device = found.setdefault(self.key, {}), self.decoder.pair.target.device
        missing = [
            (name, s) for name, all_of in self.samples.items() for s in all_of[len(known.get(name, [])) : WORTH_PROMPTS]
        ]
        if missing:
            kind = product_dtype(device.type)
            target = load_model(resolve(self.decoder.base.target, "target"), kind, device)
        for number, (name, sample) in enumerate(missing, 1):
            prompt = torch.tensor(sample.prompt(longest), device=device)
            _, tail, short = window_losses(target, prompt, kind, WORTH_ROWS)
            worth = Worth(name, sample.source, longest, len(tail), float(tail.mean()), float(short.mean()))
            known.setdefault(name, []).append(asdict(worth))
            write_file(path, json.dumps(found))
            progress("worth of context", number, len(missing), name)


def role_of(role: str) -> str:
    return "target" if role == "target" else "drafter"


def begin_texts(path: Path, asked: dict) -> list[Text]:
    """Texts written so far under the head `asked`, whose new drafters are noted; a line cut short by a kill is removed.

    Raises UserError on texts of other models.
    """
    head, texts = read_texts(path) if path.exists() else (asked, [])
    drafters = head.get("drafters", {}) | asked["drafters"]
    if head["key"] != asked["key"] or not head["drafters"].items() <= drafters.items():
        raise UserError(f"{path} was measured with other models, texts or settings", "Give another --out")
    write_file(path, "".join(json.dumps(x) + "\n" for x in (asked | {"drafters": drafters}, *map(asdict, texts))))
    return texts


def read_texts(path: Path) -> tuple[dict, list[Text]]:
    """Its head, and the texts of its whole lines."""
    head, *lines = path.read_text("utf-8").splitlines(keepends=True)
    return json.loads(head), [Text(**json.loads(line)) for line in lines if line.endswith("\n")]


def clean_tokens(texts: Sequence[Text]) -> dict[tuple, int]:
    clean: dict[tuple, int] = {}
    for t in texts:
        clean[t.cell] = clean.get(t.cell, 0) + t.clean
    return clean


# -- what they say


def is_of(text: Text, wanted: dict) -> bool:
    return all(getattr(text, key) == value for key, value in wanted.items())


def acceptance(texts: Sequence[Text], **wanted) -> float | None:
    """Accepted over drafted in rounds outside loops, of texts with these values; None where nothing was drafted."""
    mine = [t for t in texts if is_of(t, wanted)]
    drafted = sum(t.drafted for t in mine)
    return sum(t.accepted for t in mine) / drafted if drafted else None


@dataclass(frozen=True)
class Fall:
    """How far acceptance falls from one cell to another, with its one-sided 95 % upper bound."""

    what: str
    value: float | None
    upper: float | None
    limit: float | None
    clean: int  # least clean tokens of a cell that it compares

    def verdict(self, enough: int) -> str:
        if self.limit is None or self.upper is None:
            return ""
        if self.clean < enough:
            return "too few tokens"
        return verdict(self.value, self.upper, self.limit)


def verdict(value: float, upper: float | None, limit: float) -> str:
    """Of a value that may be `limit` at most, and its upper bound if there is one."""
    if upper is not None and upper <= limit:
        return "holds"
    if value > limit:
        return "does not hold"
    return "" if upper is None else "not shown"


def fall(texts: Sequence[Text], what: str, high: dict, low: dict, limit: float | None) -> Fall:
    """acceptance(high) - acceptance(low) after the prompts that both have, bounded by drawing documents."""
    sides = [[t for t in texts if is_of(t, side)] for side in (high, low)]
    both = set.intersection(*({(t.dataset, t.index) for t in side} for side in sides))
    paired = [t for side in sides for t in side if (t.dataset, t.index) in both]
    documents, clean = list(by_document(paired).values()), clean_tokens(paired)

    def difference(drawn: Sequence[list[Text]]) -> float | None:
        flat = [t for document in drawn for t in document]
        a, b = acceptance(flat, **high), acceptance(flat, **low)
        return None if a is None or b is None else a - b

    bounded = len(documents) >= MIN_DOCUMENTS
    upper = bootstrap(documents, difference, tail=0.05)[1] if bounded else None
    return Fall(what, difference(documents), upper, limit, min(clean.values(), default=0))


def by_document(measured: Sequence[Text | Worth]) -> dict[tuple[str, str], list]:
    found: dict[tuple[str, str], list] = {}
    for x in measured:
        found.setdefault((x.dataset, x.source.rpartition("@")[0]), []).append(x)
    return found


def falls(texts: Sequence[Text]) -> Iterator[Fall]:
    """The claims on texts of one data set (or of all) at one temperature."""
    contexts, budgets = sorted({t.context for t in texts}), sorted({t.budget for t in texts if t.budget != "full"})
    least, most, ours = budgets[0], budgets[-1], {"drafter": "drafter"}
    naive = any(t.drafter == "naive" for t in texts)
    for large in ["full", *([most] if most > least else [])]:
        for c in contexts:
            small, whole = ours | {"context": c, "budget": least}, ours | {"context": c, "budget": large}
            yield fall(texts, f"{large} - {least} at {c}", whole, small, SMALL_LOSS)
    near, far = (ours | {"context": c, "budget": least} for c in (contexts[0], contexts[-1]))
    yield fall(texts, f"{contexts[0]} - {contexts[-1]} at budget {least}", near, far, FAR_LOSS)
    for c in contexts if naive else ():
        rival = {"drafter": "naive", "context": c}
        small = ours | {"context": c, "budget": least}
        yield fall(texts, f"naive full - ours {least} at {c}", rival | {"budget": "full"}, small, 0.0)
        gap = fall(
            texts, f"naive full - naive {least} at {c}", rival | {"budget": "full"}, rival | {"budget": least}, None
        )
        yield gap


def report(texts: Sequence[Text], worth: Sequence[Worth], enough: int) -> str:
    """Markdown: acceptance of every cell, the claims, what the context is worth."""
    if not texts:
        return "Nothing is measured yet."
    contexts = sorted({t.context for t in texts})
    lines = ["| data set | temperature | drafter | budget |" + "".join(f" {c} |" for c in contexts) + " least clean |"]
    lines.append("| --- | ---: | --- | ---: |" + " ---: |" * (len(contexts) + 1))
    clean = clean_tokens(texts)
    rows = dict.fromkeys((t.dataset, t.temperature, t.drafter, t.budget) for t in texts)
    for dataset, temperature, drafter, budget in sorted(rows, key=str):
        of = {"dataset": dataset, "temperature": temperature, "drafter": drafter, "budget": budget}
        rates = [percent(acceptance(texts, **of, context=c)) for c in contexts]
        cells = [(dataset, c, temperature, drafter, budget) for c in contexts]
        least = min(clean[cell] for cell in cells if cell in clean)
        short = "" if least >= enough else " (too few)"
        lines.append(f"| {dataset} | {temperature:g} | {drafter} | {budget} | {' | '.join(rates)} | {least}{short} |")
    lines += ["", "| data set | temperature | fall of acceptance | points | upper bound | limit | |"]
    lines.append("| --- | ---: | --- | ---: | ---: | ---: | --- |")
    names = list(dict.fromkeys(t.dataset for t in texts))
    tested = False
    for temperature in sorted({t.temperature for t in texts}):
        for name in [*names, "all"] if len(names) > 1 else names:
            mine = [t for t in texts if t.temperature == temperature and name in (t.dataset, "all")]
            for f in [f for f in falls(mine) if f.value is not None]:
                limit = "" if f.limit is None else points(f.limit)
                row = [name, f"{temperature:g}", f.what, points(f.value), points(f.upper), limit, f.verdict(enough)]
                lines.append("| " + " | ".join(row) + " |")
                tested |= f.limit is None and f.value >= NAIVE_GAP
    if any(t.drafter == "naive" for t in texts) and not tested:
        lines += ["", f"The naive drafter loses less than {100 * NAIVE_GAP:.0f} points when it is read sparsely: this"]
        lines[-1] += " pair does not yet test the claim."
    return "\n".join([*lines, *worth_rows(worth)])


def worth_rows(measured: Sequence[Worth]) -> Iterator[str]:
    """Markdown: the target's loss at the ends of prompts, and how much higher it is without all but `SHORT` tokens."""
    yield ""
    ends = f"loss of their ends | given the last {SHORT}"
    yield f"| data set | context | prompts | {ends} | context is worth | lower bound | limit | |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
    names = list(dict.fromkeys(w.dataset for w in measured))
    for name in [*names, "all"] if len(names) > 1 else names:
        mine = [w for w in measured if name in (w.dataset, "all")]
        documents = list(by_document(mine).values())
        loss, short = fmean(w.loss for w in mine), fmean(w.short_loss for w in mine)
        gain = gained(documents)
        lower = bootstrap(documents, gained, tail=0.05)[0] if len(documents) >= MIN_DOCUMENTS else None
        row = [name, str(mine[0].context), str(len(mine)), f"{loss:.3f}", f"{short:.3f}"]
        row += [f"{gain:+.3f}", "" if lower is None else f"{lower:+.3f}", f"{CONTEXT_WORTH:.2f}"]
        row.append(verdict(-gain, None if lower is None else -lower, -CONTEXT_WORTH))
        yield "| " + " | ".join(row) + " |"


def gained(documents: Sequence[Sequence[Worth]]) -> float:
    """Nats a token that the context is worth over the prompts of these documents."""
    return fmean(w.short_loss - w.loss for document in documents for w in document)


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def points(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.1f}"


@app.command()
def run(
    on: Annotated[list[str], typer.Option(help="Held-out text, NAME=PLACE; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Folder of the measurement.")] = Path("runs/claims"),
    target: Annotated[str, typer.Option(help="Folder, hub name, or pocket.")] = "pocket",
    drafter: Annotated[str, typer.Option(help="The drafter that is measured.")] = "pocket",
    naive: Annotated[str | None, typer.Option(help="One trained on its full cache only.")] = None,
    ctx: Annotated[str, typer.Option(help="Contexts.")] = "4k,8k,16k",
    budgets: Annotated[str, typer.Option(help="The least is held against full and the largest.")] = "256,2048,full",
    temperatures: Annotated[str, typer.Option(help="0 is greedy.")] = "0,1",
    gamma: Annotated[int, typer.Option(help="Tokens drafted a round.")] = 5,
    new_tokens: Annotated[int, typer.Option(help="Tokens written after each prompt.")] = 256,
    enough: Annotated[int, typer.Option(help="Tokens outside loops that each cell needs.")] = 5000,
    prompts: Annotated[int, typer.Option(help="Most prompts of a data set.")] = 200,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Processes that decode side by side.")] = 1,
) -> None:
    """Measure what is missing, then show it."""
    settings = Settings(
        contexts=tuple(map(parse_context, ctx.split(","))),
        budgets=tuple(parse_budget(b) or "full" for b in budgets.split(",")),
        temperatures=tuple(map(float, temperatures.split(","))),
        gamma=gamma,
        new_tokens=new_tokens,
        prompts=prompts,
        dtype=dtype,
    )
    models = {"target": target, "drafter": drafter} | ({"naive": naive} if naive else {})
    job = Measurement(out, settings, on, models, jobs)
    with phases(quiet=False) as (progress, _):
        job.context_worth(progress)
        job.run(enough, progress)
    show(out, enough)


@app.command()
def show(
    out: Annotated[Path, typer.Argument(help="Folder of the measurement.")] = Path("runs/claims"),
    enough: Annotated[int, typer.Option(help="Tokens outside loops that each cell needs.")] = 5000,
) -> None:
    """Print what is measured so far."""
    if not (out / TEXTS).exists():
        raise UserError(f"{out} holds no measurement", "Start one with: python scripts/claims.py run --on NAME=PLACE")
    head, texts = read_texts(out / TEXTS)
    known = json.loads((out / WORTH).read_text("utf-8")).get(head["key"], {}) if (out / WORTH).exists() else {}
    typer.echo(report(texts, [Worth(**w) for of in known.values() for w in of], enough))


if __name__ == "__main__":
    run_script(app)
