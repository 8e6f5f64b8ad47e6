"""Training steps: skipped where they are not finite, summed over micro-batches."""

import pytest
import torch
import torch.nn.functional as F

from bdcli.base.errors import NonFiniteError
from bdcli.config.distill import Optimizer
from bdcli.train.trainer import Trainer
from tests.support.models import tiny_model


def test_steps_without_a_finite_gradient_are_counted_and_end_the_run():
    model = tiny_model(layers=1)
    trainer = Trainer(model, Optimizer(steps=50))
    before = [t.detach().clone() for t in trainer.parameters]
    broken = lambda: sum(t.sum() for t in trainer.parameters) * float("nan")  # noqa: E731
    assert trainer.step(lambda _: [broken]) != trainer.step(lambda _: [broken])
    assert trainer.state.skipped == 2 and trainer.state.step == 2
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    trainer.step(lambda _: [lambda: sum(t.square().sum() for t in trainer.parameters)])
    assert trainer.state.skipped_in_a_row == 0
    with pytest.raises(NonFiniteError, match="10 steps in a row"):
        for _ in range(10):
            trainer.step(lambda _: [broken])


def test_micro_batches_sum_to_the_whole_gradient():
    def part(trainer, rows, share):
        model = trainer_model[id(trainer)]
        return lambda: F.cross_entropy(model.embedding[rows] @ model.head.T, rows) * len(rows) / share

    models = [tiny_model(layers=1, seed=2) for _ in range(2)]
    twins = [Trainer(model, Optimizer(clip=1e9)) for model in models]
    trainer_model = {id(t): m for t, m in zip(twins, models)}
    rows = torch.arange(12)
    twins[0].step(lambda _: [part(twins[0], rows, 12)])
    twins[1].step(lambda _: [part(twins[1], rows[:5], 12), part(twins[1], rows[5:], 12)])
    assert torch.allclose(models[0].embedding, models[1].embedding, atol=1e-6)
