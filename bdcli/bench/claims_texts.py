"""The texts and losses that the claims are read from: real decoding at a fixed γ, and the target's loss at prompt ends.

Prompts are cut from held-out documents as running text; those of all contexts end at the same token. Every data set is
decoded, greedily and at temperature 1, with every drafter and budget, until each cell has enough tokens outside loops.
Every text is a line of the file as soon as it is decoded, with several processes as soon as those after the same prompt
are. A measurement resumes after a stop, and one with another drafter, budget or temperature adds its texts.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch

from bdcli.base.devices import product_dtype
from bdcli.base.files import digest, make_folder, write_file
from bdcli.base.progress import SILENT, Progress
from bdcli.bench.claims import TEXTS_FILE, WORTH_FILE, Text, Worth, append_text, clean_tokens, open_texts, read_worth
from bdcli.config.decode import DecodeOptions
from bdcli.data.samples import Sample, load_samples
from bdcli.data.sources import split_source
from bdcli.decode.pair import Pair, load_pair
from bdcli.decode.session import Session
from bdcli.model.checkpoint import fingerprint, load_model
from bdcli.model.hub import resolve
from bdcli.results.metrics import RoundFigures, looped_tokens, mark_loops
from bdcli.speculation.draft_length import FixedGamma
from bdcli.speculation.runner import Runner
from bdcli.speculation.speculator import Speculator
from bdcli.train.held_out import window_losses

WORTH_PROMPTS = 40  # of a data set, for what its context is worth
WORTH_ROWS = 4  # tokens predicted together without a long context: they see 256 to 259 tokens

ArmKey = tuple[float, str, int | str]  # temperature, drafter, budget
Task = tuple[Sample, int, list[ArmKey]]  # a prompt, its context, what is to be decoded after it


@dataclass(frozen=True)
class ClaimsSettings:
    """What the measurement depends on beside its texts and models."""

    contexts: tuple[int, ...]
    budgets: tuple[int | str, ...]
    temperatures: tuple[float, ...]
    gamma: int
    new_tokens: int
    prompts: int  # of a data set, at most
    dtype: str


class Decoder:
    """The models, and the texts they write after a prompt. `models` are names by role: target, drafter, naive."""

    def __init__(self, settings: ClaimsSettings, models: dict[str, str], progress: Progress = SILENT):
        self.settings = settings
        self.options = DecodeOptions(
            target=models["target"],
            gamma=settings.gamma,
            max_new_tokens=settings.new_tokens,
            dtype=settings.dtype,
            baseline="off",
        )
        self.pairs: dict[str, Pair] = {
            role: load_pair(replace(self.options, drafter=models[role]), progress)
            for role in ("drafter", "naive")
            if role in models
        }
        self.pair = self.pairs["drafter"]

    def texts(self, sample: Sample, context: int, arms: Sequence[ArmKey]) -> Iterator[Text]:
        """Texts of the arms after one prompt, which the target reads once."""
        prompt = sample.prompt(context)
        target = Session(self.pair, self.options).target(len(prompt), self.settings.gamma)
        target.prefill(prompt[:-1])
        for temperature, role, budget in arms:
            kept = None if budget == "full" else budget
            session = Session(self.pairs[role], replace(self.options, budget=kept, temperature=temperature))
            run, rounds = self._decode(session, target, prompt, sample.index)
            counted = [r for r in mark_loops(prompt, run.new_tokens, rounds) if not r.looped]
            looped = looped_tokens(prompt, run.new_tokens)
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
                drafted=sum(r.drafted for r in counted),
                accepted=sum(r.accepted for r in counted),
                rounds=len(rounds),
                drafted_in_all=sum(r.drafted for r in rounds),
                accepted_in_all=sum(r.accepted for r in rounds),
            )

    def _decode(
        self, session: Session, target: Runner, prompt: list[int], seed: int
    ) -> tuple[Speculator, list[RoundFigures]]:
        """One text, from a target that has read the prompt."""
        target.rollback(len(prompt) - 1)
        drafter = session.drafter(len(prompt))
        run = Speculator(target, drafter, session.sampling, seed, target.model.device)
        run.prefill(prompt, target_ready=True)
        rounds = run.rounds(self.settings.new_tokens, session.pair.eos, FixedGamma(self.settings.gamma))
        return run, [RoundFigures.of(r) for r in rounds]


class Measurement:
    """The texts in a folder, and decoding those that are missing.

    `sources`: data sets as NAME=PLACE. `models` as for `Decoder`. `jobs`: processes that decode side by side.
    """

    def __init__(
        self,
        folder: Path,
        settings: ClaimsSettings,
        sources: Sequence[str],
        models: dict[str, str],
        jobs: int = 1,
        progress: Progress = SILENT,
    ):
        self.settings, self.folder, self.models = settings, folder, models
        self.jobs, self.progress = jobs, progress
        self.decoder = Decoder(settings, models, progress)
        longest = max(settings.contexts)
        self.samples = {
            name: load_samples(self.decoder.pair.tokenizer, name, [place], settings.prompts, longest, questions=False)
            for name, place in map(split_source, sources)
        }
        fingerprints = {role: fingerprint(_folder(role, name)) for role, name in models.items()}
        self.key = self._key(fingerprints.pop("target"))
        make_folder(folder)
        self.texts = open_texts(folder / TEXTS_FILE, self.key, fingerprints)

    def _key(self, target: str) -> str:
        """Of all that texts depend on but what each carries itself, so that arms and drafters may be added later."""
        own = ("contexts", "budgets", "temperatures")
        common = {name: value for name, value in asdict(self.settings).items() if name not in own}
        ends = {name: [(s.source, s.before[-64:]) for s in samples] for name, samples in self.samples.items()}
        return digest([common, max(self.settings.contexts), ends, target])

    @property
    def arms(self) -> list[tuple[str, int | str]]:
        """(drafter, budget) of each arm."""
        return [(role, budget) for role in self.decoder.pairs for budget in self.settings.budgets]

    def run(self, enough: int) -> None:
        """Decode until every cell has `enough` clean tokens, or there are no more prompts."""
        tasks = self.missing(enough)
        if self.jobs > 1:
            texts = decode_in_parallel(self.jobs, self.settings, self.models, tasks)
        else:
            texts = (text for task in tasks for text in self.decoder.texts(*task))
        for text in texts:
            self.texts.append(text)
            append_text(self.folder / TEXTS_FILE, text)
            self.progress.advance("clean tokens", *self.done(enough), f"{text.dataset}, prompt {text.index + 1}")

    def missing(self, enough: int) -> Iterator[Task]:
        """What is to be decoded next, drawn one by one: a data set and temperature ends when its cells have enough."""
        present = {(*t.cell, t.index) for t in self.texts}
        for n in range(max(map(len, self.samples.values()))):
            for name in [name for name, samples in self.samples.items() if n < len(samples)]:
                unfinished = [t for t in self.settings.temperatures if not self.filled(name, t, enough)]
                for context in self.settings.contexts:
                    arms = [
                        (temperature, *arm)
                        for temperature in unfinished
                        for arm in self.arms
                        if (name, context, temperature, *arm, n) not in present
                    ]
                    if arms:
                        yield self.samples[name][n], context, arms

    def _cells(self, name: str, temperature: float) -> list[tuple]:
        return [(name, c, temperature, *arm) for c in self.settings.contexts for arm in self.arms]

    def filled(self, name: str, temperature: float, enough: int) -> bool:
        """Every cell of a data set and temperature has `enough`."""
        clean = clean_tokens(self.texts)
        return all(clean.get(cell, 0) >= enough for cell in self._cells(name, temperature))

    def done(self, enough: int) -> tuple[int, int]:
        """Clean tokens that count, of those that are needed."""
        clean = clean_tokens(self.texts)
        cells = [cell for name in self.samples for t in self.settings.temperatures for cell in self._cells(name, t)]
        return sum(min(enough, clean.get(cell, 0)) for cell in cells), enough * len(cells)

    def measure_worth(self) -> None:
        """The target's losses at the end of the first prompts of the longest context, once for each prompt."""
        path, longest = self.folder / WORTH_FILE, max(self.settings.contexts)
        found = read_worth(path)
        known, device = found.setdefault(self.key, {}), self.decoder.pair.target.device
        missing = [
            (name, sample)
            for name, samples in self.samples.items()
            for sample in samples[len(known.get(name, [])) : WORTH_PROMPTS]
        ]
        if not missing:
            return
        dtype = product_dtype(device.type)
        target = load_model(_folder("target", self.models["target"]), dtype, device)
        for number, (name, sample) in enumerate(missing, 1):
            prompt = torch.tensor(sample.prompt(longest), device=device)
            _, tail, short = window_losses(target, prompt, dtype, WORTH_ROWS)
            worth = Worth(name, sample.source, longest, len(tail), float(tail.mean()), float(short.mean()))
            known.setdefault(name, []).append(asdict(worth))
            write_file(path, json.dumps(found))
            self.progress.advance("worth of context", number, len(missing), name)


def _folder(role: str, name: str) -> Path:
    return resolve(name, "target" if role == "target" else "drafter")


# -- several processes


def decode_in_parallel(
    jobs: int, settings: ClaimsSettings, models: dict[str, str], tasks: Iterator[Task]
) -> Iterator[Text]:
    """The texts of `tasks` in the order they are done, decoded by `jobs` processes that share the processors."""
    arguments = settings, models, max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start_worker, arguments) as pool:
        try:
            running = {pool.submit(_decode_task, *task) for task in islice(tasks, jobs)}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield from future.result()
                # drawn only now: whether there is enough depends on what came
                running |= {pool.submit(_decode_task, *task) for task in islice(tasks, len(done))}
        finally:
            pool.shutdown(cancel_futures=True)


_decoder: Decoder | None = None  # of a worker


def _start_worker(settings: ClaimsSettings, models: dict[str, str], threads: int) -> None:
    global _decoder
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    _decoder = Decoder(settings, models)


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


def _decode_task(*task) -> list[Text]:
    return list(_decoder.texts(*task))
