"""The rows of a sweep in the store: cells opened before their texts, brought up to date after every prompt."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime

from bdcli.base.devices import dtype_name
from bdcli.base.provenance import versions
from bdcli.bench.experiment import Cell, Experiment, Task
from bdcli.bench.methods import Models
from bdcli.bench.outcome import Method
from bdcli.config.bench import DRAFTING
from bdcli.config.loader import as_dict
from bdcli.results.cells import counted, seal, summarise
from bdcli.results.gates import objections
from bdcli.results.schema import Prompt


class Recorder:
    """Writes the cells and prompts of one experiment."""

    def __init__(self, experiment: Experiment, models: Models, methods: dict[str, Method]):
        self.experiment, self.store = experiment, experiment.store
        self.models, self.methods = models, methods

    def open_cells(self, task: Task) -> dict[str, str]:
        """{arm: run_id} of a prompt's cells, their rows started or reopened."""
        return {arm: self._open(task.cell(arm)) for arm in self.experiment.recipe.arms_at(task.context)}

    def _open(self, cell: Cell) -> str:
        run_ids = self.experiment.run_ids
        if cell in run_ids:
            self.store.reopen(run_ids[cell])
        else:
            run_ids[cell] = self.store.begin("bench", self._config(cell), **self._columns(cell))
        return run_ids[cell]

    def _config(self, cell: Cell) -> dict:
        """Settings of a cell, those of the recipe among them."""
        r = self.experiment.recipe
        settings = {k: v for k, v in as_dict(r).items() if k not in ("arms", "datasets", "contexts")}
        return settings | {
            "arm": asdict(r.arms[cell.arm]),
            "sources": r.datasets[cell.dataset],
            "eos": sorted(self.models.pair.eos),
            "beside": list(r.arms_at(cell.context)),
        }

    def _columns(self, cell: Cell) -> dict:
        r, pair, arm = self.experiment.recipe, self.models.pair, self.experiment.recipe.arms[cell.arm]
        drafter = r.drafter_of(arm)
        return {
            "experiment": self.experiment.key,
            "arm": cell.arm,
            "method": arm.method,
            "dataset": cell.dataset,
            "context": cell.context,
            "target": pair.names[0],
            "drafter": drafter and self.models.with_drafter(drafter).names[1],
            "device": str(pair.target.device),
            "attention": pair.backend.name,
            "dtype": arm.dtype or dtype_name(pair.target.dtype),
            "budget": "full" if arm.method == "full" else arm.budget,
            "gamma": arm.gamma if arm.method in DRAFTING else 0,
            "temperature": r.temperature,
            "top_k": r.top_k,
            "top_p": r.top_p,
            "min_p": r.min_p,
            "repetition_penalty": r.repetition_penalty,
            "seed": r.seed,
            "versions": versions() | self.methods[cell.arm].versions(),
            **self.methods[cell.arm].columns(),
        }

    def put(self, row: Prompt) -> None:
        """Store a text, new or changed."""
        self.store.put_prompt(row)

    def update_cells(self, cells: dict[str, str]) -> None:
        """Figures, gates and seals of the cells of one data set and context; AR's first, the others refer to it."""
        stored = {run.run_id: run for run in self.store.runs(self.experiment.key)}
        ar_id = cells[self.experiment.ar]
        ar_rows = self.store.prompts(ar_id)
        for run_id in sorted(cells.values(), key=lambda i: i != ar_id):
            rows, run = self.store.prompts(run_id), stored[run_id]
            figures = summarise(counted(run, rows), counted(run, ar_rows))
            why = objections(run, rows, stored[ar_id], ar_rows)
            self.store.update(run_id, **figures, ar_run_id=ar_id, valid=not why, invalid_reason="; ".join(why) or None)
        for run in self.store.runs(self.experiment.key):
            if run.run_id in cells.values():
                self.store.update(run.run_id, seal=seal(run, self.store.prompts(run.run_id)))

    def close_cells(self, status: str) -> None:
        """End the rows that are still running."""
        for run in self.store.runs(self.experiment.key):
            if run.status == "running":
                self.store.update(run.run_id, status=status, finished_at=datetime.now(UTC))
