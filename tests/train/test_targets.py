"""Losses against cached answers of the target."""

import pytest
import torch
import torch.nn.functional as F

from bdcli.base.errors import UserError
from bdcli.train.losses import KINDS, head_loss, plain_loss
from bdcli.train.targets import ArgmaxTarget, TopKTarget
from tests.support.losses import TEMPERATURES, T, V, grads, plain, problem, target_probs


def top_k(target, k, temperature):
    top = (F.linear(target.hidden, target.head) / temperature).log_softmax(-1).topk(k)
    return TopKTarget(top.indices.int(), top.values, temperature)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_top_k_of_everything_is_the_full_target(kind, temperature):
    a = problem()
    full = head_loss(a.x, a.head, a.target, kind, temperature, a.weights)
    cached = head_loss(a.x, a.head, top_k(a.target, V, temperature), kind, temperature, a.weights, chunk=6)
    torch.testing.assert_close(cached[0], full[0])
    torch.testing.assert_close(cached[1].alpha, full[1].alpha)
    for got, want in zip(grads(cached[0], a), grads(full[0], a)):
        torch.testing.assert_close(got, want)


def bucketed(probs, index):
    """Probabilities [T, k + 1]: the listed tokens, and all others as one."""
    listed = probs.gather(-1, index)
    return torch.cat([listed, 1 - listed.sum(-1, keepdim=True)], -1)


@pytest.mark.parametrize("k", (1, 5, V - 1))
def test_top_k_tail_is_one_bucket(k):
    """KL, α and LK are those of k + 1 outcomes."""
    a = problem()
    target = top_k(a.target, k, 1.0)
    index = target.index.long()
    p, q = bucketed(target_probs(a.target, 1.0), index), bucketed(F.linear(a.x, a.head).softmax(-1), index)
    for kind in ("kl", "log_alpha", "lk"):
        losses, alpha = plain_loss(kind, p, q.log())
        loss, stats = head_loss(a.x, a.head, target, kind, 1.0, chunk=11)
        torch.testing.assert_close(stats.losses, losses.detach())
        torch.testing.assert_close(stats.alpha, alpha.detach())
        for got, want in zip(grads(loss, a), torch.autograd.grad(losses.mean(), (a.x, a.head), retain_graph=True)):
            torch.testing.assert_close(got, want)
    exact = plain("kl", a, 1.0)[2].detach()
    assert (stats.alpha >= exact - 1e-12).all()
    assert (stats.alpha <= exact + torch.minimum(p[:, -1], q[:, -1]).detach() + 1e-12).all()


def test_top_k_without_any_tail_is_one_hot():
    """Tokens of no mass, cached or not, are -inf: no 0 · inf."""
    a = problem(dtype=torch.float32)
    index = F.linear(a.target.hidden, a.target.head).topk(3).indices
    target = TopKTarget(index, torch.tensor([[0.0, -torch.inf, -torch.inf]]).repeat(T, 1), 0.8)
    for kind in KINDS:
        scaled = (a.x.detach() / 0.8).requires_grad_()
        want = head_loss(scaled, a.head, a.target, kind, 0.0)[0]
        got = head_loss(a.x, a.head, target, kind, 0.8)[0]
        torch.testing.assert_close(got, want)
        (got_x,), (want_x,) = torch.autograd.grad(got, a.x), torch.autograd.grad(want, scaled)
        torch.testing.assert_close(got_x, want_x / 0.8, rtol=1e-4, atol=1e-7)


def test_half_precision_top_k_never_exceeds_one():
    a = problem(dtype=torch.float32, seed=5)
    exact, half = top_k(a.target, V, 1.0), top_k(a.target, V, 1.0)
    half = TopKTarget(half.index, (half.log_probs + 0.01).half(), 1.0)  # 1 % too much mass in every row
    want, got = (head_loss(a.x, a.head, target, "kl", 1.0) for target in (exact, half))
    torch.testing.assert_close(got[0], want[0], rtol=2e-3, atol=0)
    assert got[1].alpha.max() <= 1 + 1e-5


def test_a_cache_that_cannot_teach_this_is_refused():
    a = problem()
    with pytest.raises(UserError, match=r"temperature 1, not 0\.7"):
        head_loss(a.x, a.head, top_k(a.target, 4, 1.0), "kl", 0.7)
    with pytest.raises(UserError, match="cannot teach kl at temperature 1"):
        head_loss(a.x, a.head, ArgmaxTarget(torch.zeros(T, dtype=torch.int)), "kl", 1.0)
    with pytest.raises(ValueError, match="log_alpha"):
        head_loss(a.x, a.head, a.target, "alpha")
