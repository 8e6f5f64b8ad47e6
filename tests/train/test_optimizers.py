"""Muon, and the shape of a learning rate over a run."""

import pytest
import torch

from bdcli.config.optimizer import Updates
from bdcli.train.optimizers import Muon, make_optimizers, orthogonal, trapezoid
from tests.support.models import tiny_model


@pytest.mark.parametrize("shape", [(8, 8), (5, 19), (16, 48)])
def test_orthogonal_keeps_singular_vectors_and_levels_singular_values(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(shape[1]))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    got = u.mT @ orthogonal(x) @ vh.mT  # diagonal where the singular vectors are kept
    off = got - torch.diag_embed(got.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 0.08
    assert float(got.diagonal(dim1=1, dim2=2).min()) > 0.5 and float(got.diagonal(dim1=1, dim2=2).max()) < 1.3


def test_muon_takes_stacked_matrices_apart():
    """q, k, v stacked in one tensor must move as three tensors of their own would."""
    g = torch.Generator().manual_seed(0)
    stacked = torch.randn(20, 8, generator=g)
    grad = torch.randn(20, 8, generator=g)
    apart = [t.clone() for t in stacked.split((8, 4, 8))]
    for t, gradient in zip((stacked, *apart), (grad, *grad.split((8, 4, 8))), strict=True):
        t.grad = gradient.clone()
    Muon([(stacked, (8, 4, 8))], 0.1, 0.01).step()
    for t in apart:
        Muon([(t, (t.shape[0],))], 0.1, 0.01).step()
    assert torch.allclose(stacked, torch.cat(apart), atol=2e-3)
    assert not torch.allclose(stacked, torch.cat(apart) * 0, atol=1)


def test_every_trainable_weight_has_exactly_one_optimizer():
    for method in ("adamw", "muon"):
        model = tiny_model()
        for t in model.tensors():
            t.requires_grad_()
        made = make_optimizers(model, Updates(method=method))
        owned = [id(t) for optimizer in made for group in optimizer.param_groups for t in group["params"]]
        assert sorted(owned) == sorted(map(id, model.tensors())) and len(made) == (2 if method == "muon" else 1)


def test_the_rate_rises_stays_and_falls_to_zero():
    rates = [trapezoid(n / 100, 0.1, 0.5) for n in range(101)]
    assert rates[0] == 0 and rates[5] == pytest.approx(0.5) and rates[10] == rates[50] == 1
    assert rates[75] == pytest.approx(0.5) and rates[100] == 0 and rates == [max(0, r) for r in rates]
