"""The micro-batches of a step: drawn from the seed, and the same whatever answers and memory are at hand."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from bdcli.base.errors import BdcliError
from bdcli.train.distill.batches import Batches
from bdcli.train.distill.plan import draw_selections
from bdcli.train.distill.run import Distillation
from bdcli.train.distill.windows import bytes_per_token
from bdcli.train.trainer import Trainer
from tests.support.training import SMALL_DISTILL


def test_views_and_order_depend_on_seed_and_step_alone(pocket):
    batches, twin = (Batches(SMALL_DISTILL, range(5), pocket[0], objective=None) for _ in range(2))
    for step in range(7):
        selections = draw_selections(SMALL_DISTILL, step)
        assert selections == draw_selections(replace(SMALL_DISTILL), step) and batches.order(step) == twin.order(step)
        budgets = [s.budget for s in selections[1:]]
        assert budgets[:2] == [40, 100] and 40 <= budgets[2] <= 100
    assert sorted(w for step in range(5) for w in batches.order(step)) == list(range(5))
    assert len({s[3].budget for s in (draw_selections(SMALL_DISTILL, n) for n in range(40))}) > 10


def test_cached_answers_teach_what_the_target_would(tmp_path):
    losses = {}
    for cache in ("none", "hidden", "topk"):
        data = replace(SMALL_DISTILL.data, cache=cache, top_k=512, written=0)
        job = Distillation(replace(SMALL_DISTILL, data=data), tmp_path / cache)
        windows = job.material().windows()
        assert windows.bytes >= bytes_per_token(job.recipe, 256) * 5 * 192
        batches = job.batches(windows)
        losses[cache] = [float(batches.loss(w, job.plan().selections, 1)) for w in range(3)]
    assert losses["hidden"] == pytest.approx(losses["none"], rel=2e-2)
    assert losses["topk"] == pytest.approx(losses["none"], rel=5e-2)


def test_a_step_that_does_not_fit_is_cut_and_gives_the_same_weights(tmp_path, monkeypatch):
    jobs = [Distillation(SMALL_DISTILL, tmp_path / name) for name in ("whole", "cut")]
    whole, cut = (job.batches(job.material().windows()) for job in jobs)
    real = cut.loss

    def small_memory(window, selections, *rest):
        if len(selections) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(window, selections, *rest)

    monkeypatch.setattr(cut, "loss", small_memory)
    drafters = [job.models().drafter for job in jobs]
    trainers = [Trainer(drafter, SMALL_DISTILL.optimizer) for drafter in drafters]
    for batches, trainer in zip((whole, cut), trainers):
        for step in range(3):
            trainer.step(partial(batches.losses, step), 1.0)
    assert [(t.state.out_of_memory, t.state.pieces) for t in trainers] == [(0, 1), (2, 4)]
    assert all(torch.allclose(a, b, atol=2e-4) for a, b in zip(*(drafter.tensors() for drafter in drafters)))

    def nothing_fits(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(cut, "loss", nothing_fits)
    with pytest.raises(BdcliError, match="does not fit into memory"):
        trainers[1].step(partial(cut.losses, 0))
