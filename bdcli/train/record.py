"""Training runs that leave a row: what they are, and everything they measure on the way."""

from __future__ import annotations

from dataclasses import asdict

from bdcli.config.loader import as_dict
from bdcli.decode.run import recorded
from bdcli.results.schema import Evaluation, Loss
from bdcli.results.store import Store
from bdcli.train.acceptance import Cell
from bdcli.train.distill.run import Distillation
from bdcli.train.held_out import Measured
from bdcli.train.pretrain.run import Pretraining


def pretrain_run(store: Store, job: Pretraining, resume: bool) -> dict:
    """Run `job` and store it with every held-out loss it measures."""
    recipe = job.recipe
    run_id = store.begin(
        "pretrain",
        as_dict(recipe),
        method="pretrain",
        dataset=",".join(recipe.corpus.sources),
        target=recipe.init,
        context=max(recipe.schedule.contexts),
        device=str(job.device),
        dtype=str(job.dtype).removeprefix("torch."),
        seed=recipe.seed,
    )
    watch = job.measured

    def keep(step: int, tokens: int, found: list[Measured]) -> None:
        store.add_measurements([Loss(run_id=run_id, step=step, tokens=tokens, **asdict(m)) for m in found])
        watch(step, tokens, found)

    job.measured = keep
    with recorded(store, run_id):
        outcome = job.run(resume)
    store.finish(run_id, outcome.status)
    return {"run_id": run_id, **asdict(outcome), "checkpoint": str(outcome.checkpoint)}


def prepare_run(store: Store, job: Distillation) -> dict:
    """Make the material of `job` and store that it was made; returns folder and accounts."""
    run_id = _begin(store, "prepare", job)
    with recorded(store, run_id):
        material = job.material(share=1.0)
        passages, windows = material.passages(), material.windows()
    store.finish(run_id, "done")
    return {
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


def distill_run(store: Store, job: Distillation, resume: bool) -> dict:
    """Run `job` and store it with every grid it measures; returns the contract's fields. Only rank 0 stores."""
    if not job.ranks.first:
        return asdict(job.run(resume))
    run_id = _begin(store, "distill", job)
    watch = job.watcher.grid

    def keep(step: int, cells: list[Cell]) -> None:
        store.add_measurements([Evaluation(run_id=run_id, step=step, **asdict(cell)) for cell in cells])
        watch(step, cells)

    job.watcher.grid = keep
    with recorded(store, run_id):
        outcome = job.run(resume)
    result = asdict(outcome) | {"initial": str(outcome.initial), "checkpoint": str(outcome.checkpoint)}
    store.finish(run_id, outcome.status)
    return {"run_id": run_id, **result}


def _begin(store: Store, command: str, job: Distillation) -> str:
    recipe = job.recipe
    return store.begin(
        command,
        as_dict(recipe),
        method=command,
        dataset=",".join(recipe.data.sources),
        target=recipe.target,
        drafter=recipe.drafter,
        context=recipe.data.context,
        device=str(job.device),
        dtype=str(job.dtype).removeprefix("torch."),
        seed=recipe.seed,
        temperature=recipe.temperature,
        gamma=recipe.evaluation.gamma,
        select=recipe.views.select,
        positions=recipe.views.positions,
    )
