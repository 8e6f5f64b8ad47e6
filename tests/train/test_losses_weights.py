"""Weights of positions that turn -log α into the expected accepted length."""

import pytest
import torch

from bdcli.train.losses import accepted_length_weights, head_loss
from tests.support.losses import grads, plain, problem


def expected_length(alpha, gamma):
    """Σ_s L_s / γ of one text [T], said as it is defined."""
    total = 0
    for s in range(len(alpha)):
        for k in range(s, min(s + gamma, len(alpha))):
            total = total + alpha[s : k + 1].prod()
    return total / gamma


@pytest.mark.parametrize("gamma", (1, 2, 5, 30))
def test_accepted_length_weights_are_its_gradient(gamma):
    log_alpha = torch.rand(2, 19, dtype=torch.float64).log().requires_grad_()
    total = sum(expected_length(row, gamma) for row in log_alpha.exp())
    (want,) = torch.autograd.grad(total, log_alpha)
    got = accepted_length_weights(log_alpha.exp(), gamma)
    torch.testing.assert_close(got, want)
    assert not got.requires_grad


def test_accepted_length_blocks_stay_inside_their_text():
    alpha = torch.rand(23, dtype=torch.float64)
    first = torch.zeros(23, dtype=torch.bool)
    first[[0, 3, 4, 15]] = True
    want = torch.cat([accepted_length_weights(text, 6) for text in alpha.split([3, 1, 11, 8])])
    torch.testing.assert_close(accepted_length_weights(alpha, 6, first), want)
    assert not torch.allclose(accepted_length_weights(alpha, 6), want)


def test_accepted_length_weights_are_bounded():
    assert accepted_length_weights(torch.ones(20), 5)[4:16].tolist() == pytest.approx([3.0] * 12)
    assert (accepted_length_weights(torch.zeros(20), 5) == 0).all()


@pytest.mark.parametrize("temperature", (0.5, 1.7))
def test_weighted_log_alpha_climbs_the_expected_length(temperature):
    """-log α with these weights has the gradient of minus the expected accepted length itself, through everything."""
    a, gamma = problem(), 4
    alpha = plain("kl", a, temperature)[2]
    want = grads(-expected_length(alpha, gamma), a)
    with torch.no_grad():
        known = head_loss(a.x, a.head, a.target, "log_alpha", temperature)[1].alpha
    weights = accepted_length_weights(known, gamma)
    loss, _ = head_loss(a.x, a.head, a.target, "log_alpha", temperature, weights, 1.0, chunk=10)
    for got, expected in zip(grads(loss, a), want):
        torch.testing.assert_close(got, expected)
