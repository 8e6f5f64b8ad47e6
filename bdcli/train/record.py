"""Training runs that leave a row in the store, with everything they measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from bdcli.base.devices import dtype_name
from bdcli.base.progress import Progress
from bdcli.config.loader import as_dict
from bdcli.decode.run import recorded, result_kept
from bdcli.results.schema import Evaluation, Loss
from bdcli.results.store import Store
from bdcli.train.acceptance import Cell
from bdcli.train.distill.run import Distillation
from bdcli.train.held_out import HeldOutLoss
from bdcli.train.pretrain.run import Pretraining

TABLES = {Cell: Evaluation, HeldOutLoss: Loss}


class Recorder(Progress):
    """Stores the figures of one run as they come, and passes everything on to `shown`. A dry run has no store."""

    def __init__(self, store: Store | None, shown: Progress):
        self.store, self._shown = store, shown
        self._run_id: str | None = None

    def begin(self, command: str, config: dict, **columns: object) -> str:
        """Add the run to the store; what is measured from here on belongs to it. Returns its id."""
        self._run_id = self.store.begin(command, config, **columns)
        return self._run_id

    def note(self, line: str) -> None:
        self._shown.note(line)

    def advance(self, phase: str, done: float, total: float, detail: str = "") -> None:
        self._shown.advance(phase, done, total, detail)

    def text(self, piece: str) -> None:
        self._shown.text(piece)

    def measured(self, rows: Sequence[Cell | HeldOutLoss], **at: int) -> None:
        """`at`: step, and tokens of a pretrain run. Raises RuntimeError before `begin`."""
        if self._run_id is None:
            raise RuntimeError("nothing can be stored before the run has begun")
        self.store.add_measurements([TABLES[type(row)](run_id=self._run_id, **at, **asdict(row)) for row in rows])
        self._shown.measured(rows, **at)


def pretrain_run(recorder: Recorder, job: Pretraining, resume: bool) -> dict:
    """Run `job`, which reports to `recorder`; returns the contract's fields."""
    recipe = job.recipe
    job.check_space()
    run_id = recorder.begin(
        "pretrain",
        as_dict(recipe),
        method="pretrain",
        dataset=",".join(recipe.corpus.sources),
        target=recipe.init,
        context=max(recipe.schedule.contexts),
        device=str(job.device),
        dtype=dtype_name(job.dtype),
        seed=recipe.seed,
    )
    with recorded(recorder.store, run_id):
        outcome = job.run(resume)
    result = {"run_id": run_id, **asdict(outcome), "checkpoint": str(outcome.checkpoint)}
    with result_kept(result):
        recorder.store.finish(run_id, outcome.status)
    return result


def prepare_run(recorder: Recorder, job: Distillation) -> dict:
    """Make the material of `job`, which reports to `recorder`; returns its folder and accounts."""
    run_id = _begin(recorder, "prepare", job)
    with recorded(recorder.store, run_id):
        material = job.material(share=1.0)
        passages, windows = material.passages(), material.windows()
    result = {
        "run_id": run_id,
        "folder": str(job.data),
        "documents": asdict(windows.documents),
        "windows": asdict(windows.accounts),
        "shards": windows.shards,
        "bytes": windows.bytes,
        "written": len(windows.loop_rates),
        "loop_rate": sum(windows.loop_rates) / len(windows.loop_rates) if windows.loop_rates else None,
        "passages": len(passages),
    }
    with result_kept(result):
        recorder.store.finish(run_id, "done")
    return result


def distill_run(recorder: Recorder, job: Distillation, resume: bool) -> dict:
    """Run `job`, which reports to `recorder`; returns the contract's fields. Only the first rank stores."""
    if not job.ranks.first:
        return asdict(job.run(resume))
    run_id = _begin(recorder, "distill", job)
    with recorded(recorder.store, run_id):
        outcome = job.run(resume)
    folders = {"initial": str(outcome.initial), "checkpoint": str(outcome.checkpoint)}
    result = {"run_id": run_id, **asdict(outcome), **folders}
    with result_kept(result):
        recorder.store.finish(run_id, outcome.status)
    return result


def _begin(recorder: Recorder, command: str, job: Distillation) -> str:
    """Load the models, so that bad input raises before a row is written, and add the row."""
    recipe = job.recipe
    job.plan().check_space(training=command == "distill")
    job.models()
    return recorder.begin(
        command,
        as_dict(recipe),
        method=command,
        dataset=",".join(recipe.data.sources),
        target=recipe.target,
        drafter=recipe.drafter,
        context=recipe.data.context,
        device=str(job.device),
        dtype=dtype_name(job.dtype),
        seed=recipe.seed,
        temperature=recipe.temperature,
        gamma=recipe.evaluation.gamma,
        select=recipe.views.select,
        positions=recipe.views.positions,
    )
