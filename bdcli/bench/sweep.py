"""A sweep: every arm on every prompt, side by side. One row an arm and prompt is stored, so it can stop anywhere.

task (`bdcli.bench.experiment`):  read the prompt once with the target
    arms, in an order that rotates from task to task:  roll back, generate, store
    compare every text with AR's, then bring the cells' rows up to date (`bdcli.bench.recorder`)
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict

from bdcli.base.errors import NonFiniteError
from bdcli.base.interrupt import Interrupt, deferred_interrupt
from bdcli.base.progress import SILENT, Progress
from bdcli.bench.experiment import Experiment, Task
from bdcli.bench.memory import check_sweep
from bdcli.bench.methods import METHODS, Models
from bdcli.bench.outcome import MemoryMeter, Outcome, PreparedTarget
from bdcli.bench.paper import compare
from bdcli.bench.recorder import Recorder
from bdcli.config.bench import BenchRecipe
from bdcli.config.decode import DecodeOptions
from bdcli.data.samples import ids_digest
from bdcli.decode.session import Session
from bdcli.results.cells import cell_json
from bdcli.results.gates import remarks
from bdcli.results.metrics import mark_loops, measure
from bdcli.results.schema import Prompt, Run
from bdcli.results.store import Store
from bdcli.speculation.baseline import teacher_force

ERROR_CHARACTERS = 300


class Sweep:
    """Measures what is missing of an experiment. Loads every model that its arms need.

    `fresh` measures again what is stored already.
    """

    def __init__(self, recipe: BenchRecipe, store: Store, progress: Progress = SILENT, fresh: bool = False):
        self.progress, self.experiment = progress, Experiment(recipe, store, fresh)
        self.recipe = recipe = self.experiment.recipe
        for line in self.experiment.notes():
            progress.note(line)
        check_sweep(recipe, progress)
        self.models = Models(recipe, progress)
        self.methods = {name: METHODS[arm.method](self.models, arm) for name, arm in recipe.arms.items()}
        self.recorder = Recorder(self.experiment, self.models, self.methods)
        self.gamma_max = max(method.gamma_max for method in self.methods.values())
        self._done = 0  # cost of the texts that are stored, in tokens

    def run(self) -> dict:
        """Measure what is missing. Ctrl-C ends it after the running arm.

        Returns {experiment, status, cells, remarks}, with the paper's figures where its protocol was asked for.
        """
        self._done, status = 0, "interrupted"
        try:
            with deferred_interrupt() as interrupt:
                for task in self.experiment.tasks:
                    self._measure(task, interrupt)
                    if interrupt.requested:
                        break
                else:
                    status = "done"
        finally:
            for method in self.methods.values():
                method.close()
            self.recorder.close_cells(status)
        runs = self.experiment.runs()
        result = {"experiment": self.experiment.key, "status": status, "cells": [cell_json(run) for run in runs]}
        result["remarks"] = [line for run in runs for line in self._remarks(run)]
        return result | ({"paper": compare(runs)} if self.recipe.protocol == "paper" else {})

    def _remarks(self, run: Run) -> Iterator[str]:
        """Remarks about a cell."""
        ar = next((other for other in self.experiment.runs() if other.run_id == run.ar_run_id), None)
        for line in remarks(run, self.experiment.store.prompts(run.run_id), ar):
            yield f"{run.dataset} {run.context} {run.arm}: {line}"

    def _measure(self, task: Task, interrupt: Interrupt) -> None:
        """One prompt: all arms that have not generated after it, the comparison with AR, the cells' rows."""
        cells, rows = self.recorder.open_cells(task), self.experiment.stored(task)
        self._done += task.cost * len(rows)
        missing = [arm for arm in self._rotated(task) if arm not in rows]
        if not missing and not self._uncompared(rows):
            return
        prompt = task.sample.prompt(task.context)
        prepared = self._prepare_target(prompt)
        for arm in missing:
            self._report(task, arm)
            rows[arm] = self._generate(arm, cells[arm], task, prompt, prepared)
            self.recorder.put(rows[arm])
            self._done += task.cost
            if interrupt.requested:
                break
        self._compare_with_ar(rows, prompt, prepared)
        self.recorder.update_cells(cells)
        self.progress.advance("bench", self._done, self.experiment.cost, task.sample.dataset)
        self.progress.measured(self.experiment.runs())

    def _rotated(self, task: Task) -> list[str]:
        """Arms of a task, each in turn the first."""
        arms = list(self.recipe.arms_at(task.context))
        first = task.turn % len(arms)
        return arms[first:] + arms[:first]

    def _report(self, task: Task, arm: str) -> None:
        sample, count = task.sample, len(self.experiment.samples[task.sample.dataset])
        detail = f"{sample.dataset} {task.context}, prompt {sample.index + 1} of {count}: {arm}"
        self.progress.advance("bench", self._done, self.experiment.cost, detail)

    def _prepare_target(self, prompt: list[int]) -> PreparedTarget:
        """Read the prompt with the target, once for all arms."""
        options = DecodeOptions(max_new_tokens=self.recipe.max_new_tokens)
        runner = Session(self.models.pair, options).target(len(prompt), self.gamma_max)
        started = time.perf_counter()
        runner.prefill(prompt[:-1])
        return PreparedTarget(runner, time.perf_counter() - started)

    def _generate(self, arm: str, run_id: str, task: Task, prompt: list[int], prepared: PreparedTarget) -> Prompt:
        """One text by one arm, as a row. Broken logits, and whatever a peer raises, become the row's error."""
        method, meter, sample = self.methods[arm], MemoryMeter(), task.sample
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
            row.error = f"{type(error).__name__}: {' '.join(str(error).split())[:ERROR_CHARACTERS]}"
            return row
        self._fill(row, prompt, outcome, meter)
        if row.tokens_per_second is None:
            row.error = "the text came in one block, so there is no speed to measure"
        return row

    def _fill(self, row: Prompt, prompt: list[int], outcome: Outcome, meter: MemoryMeter) -> None:
        """Figures of a text."""
        for name, value in asdict(measure(prompt, outcome.tokens, outcome.rounds)).items():
            setattr(row, name, value)
        row.tokens, row.finish_reason = outcome.tokens, outcome.finish_reason
        row.text = self.models.pair.tokenizer.decode(outcome.tokens)
        row.rounds = [r.row() for r in mark_loops(prompt, outcome.tokens, outcome.rounds)]
        row.ttft_s, row.max_drafter_entries = outcome.ttft_s, outcome.entries
        row.drafter_kv_bytes, row.target_kv_bytes = outcome.drafter_kv_bytes, outcome.target_kv_bytes
        if meter.growth is not None and outcome.weight_bytes is not None:
            row.peak_memory_bytes = outcome.weight_bytes + outcome.target_kv_bytes + meter.growth

    @property
    def _greedy(self) -> bool:
        return self.recipe.temperature == 0

    def _uncompared(self, rows: dict[str, Prompt]) -> list[Prompt]:
        """Texts that have to equal AR's and were not compared with it."""
        return [row for row in rows.values() if row.output_equal is None and row.error is None] if self._greedy else []

    def _compare_with_ar(self, rows: dict[str, Prompt], prompt: list[int], prepared: PreparedTarget) -> None:
        """Every text equals AR's; beyond fp32 it is judged token by token from the first difference on."""
        ar = rows.get(self.experiment.ar)
        if ar is None or ar.error is not None:
            return
        for row in self._uncompared(rows):
            row.output_equal, row.ties = row.tokens == ar.tokens, 0
            if not row.output_equal and not prepared.target.exact:
                rule = teacher_force(prepared.target, prompt, row.tokens, self.recipe.repetition_penalty)
                row.output_equal, row.ties = rule.equal, rule.ties
            self.recorder.put(row)
