"""A sweep: every arm on every prompt, side by side. One row an arm and prompt is stored, so it can stop anywhere.

    sample × context × data set:  read the prompt once with the target
        arms, in an order that rotates from prompt to prompt:  roll back, generate, store
        compare every text with AR's, then bring the cells' rows up to date

An experiment is the recipe, the models, the prompts, the machine and the revision. Started again it goes on with what
is not stored yet.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import UTC, datetime

from bdcli.base.errors import NonFiniteError, UserError
from bdcli.base.files import digest
from bdcli.base.interrupt import Interrupt, deferred_interrupt
from bdcli.base.progress import SILENT, Progress
from bdcli.base.provenance import git_revision, machine, versions
from bdcli.bench.methods import METHODS, Models
from bdcli.bench.outcome import Held, MemoryMeter, Outcome
from bdcli.bench.paper import beside
from bdcli.config.bench import DRAFTING, Arm, BenchRecipe
from bdcli.config.decode import DecodeOptions
from bdcli.config.loader import as_dict
from bdcli.data.samples import Sample, ids_digest, load_samples
from bdcli.decode.session import Session
from bdcli.model.checkpoint import fingerprint, resolve
from bdcli.results.cells import cell_json, counted, seal, summarise
from bdcli.results.gates import objections
from bdcli.results.metrics import mark_loops, measure
from bdcli.results.schema import Prompt, Run
from bdcli.results.store import Store, running
from bdcli.speculation.baseline import teacher_force

OVERHEAD_TOKENS = 8192  # an arm's cost grows with the context, from about this many tokens' worth


class Sweep:
    """One experiment in one store. `fresh` measures anew what is stored already."""

    def __init__(self, recipe: BenchRecipe, store: Store, progress: Progress = SILENT, fresh: bool = False):
        self.recipe, self.store, self.progress = recipe, store, progress
        self.models = Models(recipe, progress)
        pair = self.models.pair
        self.greedy = recipe.temperature == 0
        self.methods = {name: METHODS[arm.method](self.models, arm) for name, arm in recipe.arms.items()}
        self.ar = next(name for name, arm in recipe.arms.items() if arm.method == "ar")
        self.gamma_max = max(method.gamma_max for method in self.methods.values())
        longest = max(recipe.contexts)
        self._check_length(longest + recipe.max_new_tokens)
        self.samples = {
            name: load_samples(pair.tokenizer, name, sources, recipe.samples, longest)
            for name, sources in recipe.datasets.items()
        }
        self.key = self._experiment(fresh)
        self._cells: dict[tuple[str, int, str], str] = {
            (run.dataset, run.context, run.arm): run.run_id for run in store.runs(self.key)
        }
        self._work = [
            (self.samples[dataset][n], context)
            for n in range(recipe.samples)
            for context in sorted(recipe.contexts)
            for dataset in recipe.datasets
            if n < len(self.samples[dataset])
        ]

    def _check_length(self, needed: int) -> None:
        names = {self.recipe.target: self.models.pair.target, self.recipe.drafter: self.models.pair.drafter}
        for name, model in names.items():
            limit = min(model.config.max_position, model.config.sliding_window or model.config.max_position)
            if needed > limit:
                raise UserError(
                    f"{max(self.recipe.contexts)} prompt + {self.recipe.max_new_tokens} new tokens exceed the {limit} "
                    f"positions of {name}",
                    "Lower --ctx or --max-new-tokens",
                )

    def _experiment(self, fresh: bool) -> str:
        """Key of everything that a figure depends on, and a number: `fresh` takes the next one."""
        r = self.recipe
        folders = [resolve(r.target, "target"), resolve(r.drafter, "drafter")]
        folders += [resolve(name, "drafter") for arm in r.arms.values() if (name := r.drafter_of(arm)) is not None]
        prompts = [ids_digest(s.prompt(max(r.contexts))) for samples in self.samples.values() for s in samples]
        parts = [as_dict(r), [fingerprint(f) for f in folders], prompts, machine(), versions(), git_revision()]
        base = digest(parts)[:16]
        stored = {run.experiment for run in self.store.runs() if (run.experiment or "").startswith(base)}
        last = max((int(key.rpartition("-")[2]) for key in stored), default=0)
        if last and any(running(run) for run in self.store.runs(f"{base}-{last}")):
            raise UserError("another process is measuring this very experiment", "Wait for it, or change the recipe")
        return f"{base}-{last + 1 if fresh or not last else last}"

    def plan(self) -> list[str]:
        """What the sweep will do, in lines."""
        r, todo = self.recipe, sum(len(self._missing(s, c)) for s, c in self._work)
        total = sum(len(r.arms_at(c)) for _, c in self._work)
        contexts = ", ".join(map(str, sorted(r.contexts)))
        counts = ", ".join(f"{len(samples)} of {name}" for name, samples in self.samples.items())
        lines = [
            f"{len(r.arms)} arms × contexts {contexts} × prompts {counts}: {total} texts of {r.max_new_tokens} tokens",
            f"experiment {self.key}: {total - todo} of {total} texts are stored, {todo} are to be written",
        ]
        if r.naive is not None and resolve(r.naive, "drafter") == resolve(r.drafter, "drafter"):
            lines.append("naive and drafter are the same model: the bd arms measure an undistilled drafter")
        return lines

    def run(self) -> dict:
        """Measure what is missing; returns {experiment, status, cells}. Ctrl-C ends it after the running arm."""
        total = sum(self._cost(context) * len(self.recipe.arms_at(context)) for _, context in self._work)
        self._done = 0.0
        status = "interrupted"
        try:
            with deferred_interrupt() as interrupt:
                for turn, (sample, context) in enumerate(self._work):
                    self._measure(sample, context, turn, total, interrupt)
                    if interrupt.requested:
                        break
                else:
                    status = "done"
        finally:
            for run in self.store.runs(self.key):
                if run.status == "running":
                    self.store.update(run.run_id, status=status, finished_at=datetime.now(UTC))
        runs = self.runs()
        result = {"experiment": self.key, "status": status, "cells": [cell_json(run) for run in runs]}
        return result | ({"paper": beside(runs)} if self.recipe.protocol == "paper" else {})

    def runs(self) -> list[Run]:
        """Rows of all cells, by data set, context, and order of the recipe's arms."""
        order = list(self.recipe.arms)
        datasets = list(self.recipe.datasets)
        return sorted(
            self.store.runs(self.key), key=lambda r: (datasets.index(r.dataset), r.context, order.index(r.arm))
        )

    def _cost(self, context: int) -> float:
        return context + OVERHEAD_TOKENS

    def _missing(self, sample: Sample, context: int) -> list[str]:
        """Arms that have not written on from this prompt."""
        have = self._rows(sample, context)
        return [name for name in self.recipe.arms_at(context) if name not in have]

    def _rows(self, sample: Sample, context: int) -> dict[str, Prompt]:
        found = {}
        for name in self.recipe.arms_at(context):
            run_id = self._cells.get((sample.dataset, context, name))
            rows = self.store.prompts(run_id) if run_id else []
            row = next((row for row in rows if row.index == sample.index), None)
            if row is not None:
                found[name] = row
        return found

    def _measure(self, sample: Sample, context: int, turn: int, total: float, interrupt: Interrupt) -> None:
        """One prompt: all arms that have not read it yet, the comparison with AR, the cells' rows."""
        arms = self.recipe.arms_at(context)
        cells = {name: self._cell(sample.dataset, context, name, arm) for name, arm in arms.items()}
        rows, share = self._rows(sample, context), self._cost(context)
        names = list(arms)
        turned = [name for i in range(len(names)) if (name := names[(i + turn) % len(names)]) not in rows]
        self._done += share * len(rows)
        unsettled = self.greedy and any(r.output_equal is None and r.error is None for r in rows.values())
        if not turned and not unsettled:
            return
        prompt = sample.prompt(context)
        held = self._hold(prompt)
        for name in turned:
            label = f"{sample.dataset} {context}, prompt {sample.index + 1} of {len(self.samples[sample.dataset])}"
            self.progress.advance("bench", self._done, total, f"{label}: {name}")
            rows[name] = self._arm(name, cells[name], sample, prompt, held)
            self.store.put_prompt(rows[name])
            self._done += share
            if interrupt.requested:
                break
        self._settle(rows, prompt, held)
        self._bring_up_to_date(cells)
        self.progress.advance("bench", self._done, total, sample.dataset)
        self.progress.measured(self.runs())

    def _cell(self, dataset: str, context: int, name: str, arm: Arm) -> str:
        """run_id of a cell, its row begun or reopened."""
        key = (dataset, context, name)
        if key in self._cells:
            self.store.reopen(self._cells[key])
            return self._cells[key]
        r, pair = self.recipe, self.models.pair
        settings = {k: v for k, v in as_dict(r).items() if k not in ("arms", "datasets", "contexts")}
        drafter = r.drafter_of(arm)
        self._cells[key] = self.store.begin(
            "bench",
            settings
            | {"arm": asdict(arm), "sources": r.datasets[dataset], "eos": sorted(pair.eos)}
            | {"beside": list(r.arms_at(context))},
            experiment=self.key,
            arm=name,
            method=arm.method,
            dataset=dataset,
            context=context,
            target=pair.names[0],
            drafter=drafter and self.models.with_drafter(drafter).names[1],
            device=str(pair.target.device),
            attention=pair.backend.name,
            dtype=arm.dtype or str(pair.target.dtype).removeprefix("torch."),
            budget="full" if arm.method == "full" else arm.budget,
            gamma=arm.gamma if arm.method in DRAFTING else 0,
            temperature=r.temperature,
            top_k=r.top_k,
            top_p=r.top_p,
            seed=r.seed,
            **self.methods[name].columns(),
        )
        return self._cells[key]

    def _hold(self, prompt: list[int]) -> Held:
        """Read the prompt with the target, once for all arms."""
        self._held = None  # the cache before goes first
        options = DecodeOptions(max_new_tokens=self.recipe.max_new_tokens)
        runner = Session(self.models.pair, options).target(len(prompt), self.gamma_max)
        started = time.perf_counter()
        runner.prefill(prompt[:-1])
        self._held = Held(runner, time.perf_counter() - started)
        return self._held

    def _arm(self, name: str, run_id: str, sample: Sample, prompt: list[int], held: Held) -> Prompt:
        """One text by one arm, as a row. Broken logits, and whatever a peer raises, become the row's error."""
        method, meter = self.methods[name], MemoryMeter()
        row = Prompt(
            run_id=run_id,
            index=sample.index,
            source=sample.source,
            sha256=ids_digest(prompt),
            context=len(prompt),
            text="",
        )
        try:
            method.prepare(prompt)
            with meter.watch(held.target.model.device):
                outcome = method.generate(prompt, held, self.recipe.seed + sample.index)
        except Exception as error:
            if not method.peer and not isinstance(error, NonFiniteError):
                raise
            row.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return row
        self._fill(row, prompt, outcome, meter)
        if row.tokens_per_second is None:
            row.error = "the text came in one block, so there is no speed to measure"
        return row

    def _fill(self, row: Prompt, prompt: list[int], outcome: Outcome, meter: MemoryMeter) -> None:
        m = measure(prompt, outcome.tokens, outcome.rounds)
        for name, value in asdict(m).items():
            setattr(row, name, value)
        row.tokens, row.finish_reason = outcome.tokens, outcome.finish_reason
        row.text = self.models.pair.tokenizer.decode(outcome.tokens)
        row.rounds = [r.row() for r in mark_loops(prompt, outcome.tokens, outcome.rounds)]
        row.ttft_s, row.max_drafter_entries = outcome.ttft_s, outcome.entries
        row.drafter_kv_bytes, row.target_kv_bytes = outcome.drafter_kv_bytes, outcome.target_kv_bytes
        if meter.growth is not None:
            row.peak_memory_bytes = outcome.weight_bytes + outcome.target_kv_bytes + meter.growth

    def _settle(self, rows: dict[str, Prompt], prompt: list[int], held: Held) -> None:
        """Compare every text with AR's: equal, or beyond fp32 judged token by token from the first difference on."""
        ar = rows.get(self.ar)
        if not self.greedy or ar is None or ar.error is not None:
            return
        exact = held.target.exact
        for row in rows.values():
            if row.error is not None or row.output_equal is not None:
                continue
            row.output_equal, row.ties = row.tokens == ar.tokens, 0
            if not row.output_equal and not exact:
                rule = teacher_force(held.target, prompt, row.tokens)
                row.output_equal, row.ties = rule.equal, rule.ties
            self.store.put_prompt(row)

    def _bring_up_to_date(self, cells: dict[str, str]) -> None:
        """Figures, gates and seals of the cells of one data set and context; AR's first, the others refer to it."""
        stored = {run.run_id: run for run in self.store.runs(self.key)}
        ar_id = cells[self.ar]
        ar_rows = self.store.prompts(ar_id)
        for run_id in sorted(cells.values(), key=lambda i: i != ar_id):
            rows, run = self.store.prompts(run_id), stored[run_id]
            figures = summarise(counted(run, rows), counted(run, ar_rows))
            why = objections(run, rows, stored[ar_id], ar_rows)
            self.store.update(run_id, **figures, ar_run_id=ar_id, valid=not why, invalid_reason="; ".join(why) or None)
        for run in self.store.runs(self.key):
            if run.run_id in cells.values():
                self.store.update(run.run_id, seal=seal(run, self.store.prompts(run.run_id)))
