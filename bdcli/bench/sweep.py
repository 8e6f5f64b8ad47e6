"""A sweep: every arm on every prompt, side by side. One row an arm and prompt is stored, so it can stop anywhere.

sample × context × data set:  read the prompt once with the target
    arms, in an order that rotates from prompt to prompt:  roll back, generate, store
    compare every text with AR's, then update the cells' rows
"""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import UTC, datetime

from bdcli.base.errors import NonFiniteError
from bdcli.base.interrupt import Interrupt, deferred_interrupt
from bdcli.base.progress import SILENT, Progress
from bdcli.bench.experiment import Experiment
from bdcli.bench.methods import METHODS, Models
from bdcli.bench.outcome import MemoryMeter, Outcome, PreparedTarget
from bdcli.bench.paper import beside
from bdcli.config.bench import BenchRecipe
from bdcli.config.decode import DecodeOptions
from bdcli.data.samples import Sample, ids_digest
from bdcli.decode.session import Session
from bdcli.results.cells import cell_json, counted, seal, summarise
from bdcli.results.gates import objections
from bdcli.results.metrics import mark_loops, measure
from bdcli.results.schema import Prompt
from bdcli.results.store import Store
from bdcli.speculation.baseline import teacher_force

OVERHEAD_TOKENS = 8192  # an arm's cost grows with the context, from about this many tokens' worth


class Sweep:
    """One experiment in one store. `fresh` measures again what is stored already."""

    def __init__(self, recipe: BenchRecipe, store: Store, progress: Progress = SILENT, fresh: bool = False):
        self.recipe, self.store, self.progress = recipe, store, progress
        self.models = Models(recipe, progress)
        self.greedy = recipe.temperature == 0
        self.methods = {name: METHODS[arm.method](self.models, arm) for name, arm in recipe.arms.items()}
        self.ar = next(name for name, arm in recipe.arms.items() if arm.method == "ar")
        self.gamma_max = max(method.gamma_max for method in self.methods.values())
        self.experiment = Experiment(recipe, store, self.models, fresh)
        self._prepared: PreparedTarget | None = None
        self._done = 0.0
        costs = (_cost(context) * len(recipe.arms_at(context)) for _, context in self.experiment.work)
        self._total = sum(costs)

    def run(self) -> dict:
        """Measure what is missing; returns {experiment, status, cells}. Ctrl-C ends it after the running arm."""
        key, status = self.experiment.key, "interrupted"
        self._done = 0.0
        try:
            with deferred_interrupt() as interrupt:
                for turn, (sample, context) in enumerate(self.experiment.work):
                    self._measure(sample, context, turn, interrupt)
                    if interrupt.requested:
                        break
                else:
                    status = "done"
        finally:
            for run in self.store.runs(key):
                if run.status == "running":
                    self.store.update(run.run_id, status=status, finished_at=datetime.now(UTC))
        runs = self.experiment.runs()
        result = {"experiment": key, "status": status, "cells": [cell_json(run) for run in runs]}
        return result | ({"paper": beside(runs)} if self.recipe.protocol == "paper" else {})

    def _measure(self, sample: Sample, context: int, turn: int, interrupt: Interrupt) -> None:
        """One prompt: all arms that have no text for it yet, the comparison with AR, the cells' rows."""
        names = list(self.recipe.arms_at(context))
        cells = {name: self.experiment.cell(sample.dataset, context, name, self.methods[name]) for name in names}
        rows, cost = self.experiment.rows(sample, context), _cost(context)
        first = turn % len(names)
        missing = [name for name in names[first:] + names[:first] if name not in rows]
        self._done += cost * len(rows)
        not_compared = self.greedy and any(r.output_equal is None and r.error is None for r in rows.values())
        if not missing and not not_compared:
            return
        prompt = sample.prompt(context)
        prepared = self._prepare_target(prompt)
        count = len(self.experiment.samples[sample.dataset])
        for name in missing:
            label = f"{sample.dataset} {context}, prompt {sample.index + 1} of {count}: {name}"
            self.progress.advance("bench", self._done, self._total, label)
            rows[name] = self._arm(name, cells[name], sample, prompt, prepared)
            self.store.put_prompt(rows[name])
            self._done += cost
            if interrupt.requested:
                break
        self._compare_with_ar(rows, prompt, prepared)
        self._update_cells(cells)
        self.progress.advance("bench", self._done, self._total, sample.dataset)
        self.progress.measured(self.experiment.runs())

    def _prepare_target(self, prompt: list[int]) -> PreparedTarget:
        """Read the prompt with the target, once for all arms."""
        self._prepared = None  # frees the cache of the prompt before
        options = DecodeOptions(max_new_tokens=self.recipe.max_new_tokens)
        runner = Session(self.models.pair, options).target(len(prompt), self.gamma_max)
        started = time.perf_counter()
        runner.prefill(prompt[:-1])
        self._prepared = PreparedTarget(runner, time.perf_counter() - started)
        return self._prepared

    def _arm(self, name: str, run_id: str, sample: Sample, prompt: list[int], prepared: PreparedTarget) -> Prompt:
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
            with meter.watch(prepared.target.model.device):
                outcome = method.generate(prompt, prepared, self.recipe.seed + sample.index)
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

    def _compare_with_ar(self, rows: dict[str, Prompt], prompt: list[int], prepared: PreparedTarget) -> None:
        """Compare every text with AR's: equal, or beyond fp32 judged token by token from the first difference on."""
        ar = rows.get(self.ar)
        if not self.greedy or ar is None or ar.error is not None:
            return
        exact = prepared.target.exact
        for row in rows.values():
            if row.error is not None or row.output_equal is not None:
                continue
            row.output_equal, row.ties = row.tokens == ar.tokens, 0
            if not row.output_equal and not exact:
                rule = teacher_force(prepared.target, prompt, row.tokens)
                row.output_equal, row.ties = rule.equal, rule.ties
            self.store.put_prompt(row)

    def _update_cells(self, cells: dict[str, str]) -> None:
        """Figures, gates and seals of the cells of one data set and context; AR's first, the others refer to it."""
        stored = {run.run_id: run for run in self.store.runs(self.experiment.key)}
        ar_id = cells[self.ar]
        ar_rows = self.store.prompts(ar_id)
        for run_id in sorted(cells.values(), key=lambda i: i != ar_id):
            rows, run = self.store.prompts(run_id), stored[run_id]
            figures = summarise(counted(run, rows), counted(run, ar_rows))
            why = objections(run, rows, stored[ar_id], ar_rows)
            self.store.update(run_id, **figures, ar_run_id=ar_id, valid=not why, invalid_reason="; ".join(why) or None)
        for run in self.store.runs(self.experiment.key):
            if run.run_id in cells.values():
                self.store.update(run.run_id, seal=seal(run, self.store.prompts(run.run_id)))


def _cost(context: int) -> float:
    """Of one text, in tokens."""
    return context + OVERHEAD_TOKENS
