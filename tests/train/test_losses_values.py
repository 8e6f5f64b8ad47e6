"""Values and gradients of the losses: those of the plain formulas and of finite differences, whatever the chunk."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from bdcli.train import losses
from bdcli.train.losses import KINDS, LK_DECAY, head_loss, plain_loss
from bdcli.train.targets import ArgmaxTarget, HiddenTarget, TopKTarget
from tests.support.losses import TEMPERATURES, T, V, grads, plain, problem, target_probs


def test_the_plain_losses_by_hand():
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.4, 0.5, 0.1]])
    kl, overlap = 0.7 * math.log(0.7 / 0.4) + 0.2 * math.log(0.2 / 0.5), 0.7
    blend = math.exp(-3 * 0.7)
    expected = {"ce": -math.log(0.4), "kl": kl, "log_alpha": -math.log(0.7), "lk": blend * kl + (1 - blend) * 0.3}
    for kind, value in expected.items():
        losses, alpha = plain_loss(kind, p, 2 * q.log(), 2.0)
        assert float(losses) == pytest.approx(value, rel=1e-5)
        assert float(alpha) == pytest.approx(overlap, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", (0.0, *TEMPERATURES))
def test_equal_to_the_plain_losses_at_every_chunk(kind, temperature):
    for seed, (dtype, tolerance) in enumerate([(torch.float64, 1e-11), (torch.float32, 2e-5)]):
        a = problem(dtype=dtype, seed=seed)
        expected, losses, alpha = plain(kind, a, temperature)
        wanted = grads(expected, a)
        assert all(g.abs().max() > 1e-3 for g in wanted)
        for chunk in (1, 7, T - 1, T, 1000):
            loss, stats = head_loss(a.x, a.head, a.target, kind, temperature, a.weights, chunk=chunk)
            close = {"rtol": tolerance, "atol": tolerance}
            torch.testing.assert_close(loss, expected, **close)
            torch.testing.assert_close(stats.losses, losses.detach(), **close)
            torch.testing.assert_close(stats.alpha, alpha.detach(), **close)
            for got, want in zip(grads(loss, a), wanted):
                torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_rows_in_a_kernel_give_the_same(kind, temperature, monkeypatch):
    """The way of a GPU with the kernel's plain twin: logits become gradients in place, two views, several chunks."""
    from bd_kernels import reference

    a, b = problem(dtype=torch.float64, seed=7), problem(dtype=torch.float64, seed=7)
    weights = torch.stack((a.weights, a.weights.flip(0)))
    want, seen = head_loss(torch.stack((a.x, 0.5 * a.x)), a.head, a.target, kind, temperature, weights)
    calls = []

    def rows(z, *rest):
        calls.append(z.shape[0])
        return reference.loss_rows(z, *rest)

    monkeypatch.setattr(losses, "kernel_rows", lambda *_: (rows, 7))
    monkeypatch.setattr(losses, "LOGIT_ROWS", 1)
    loss, stats = head_loss(torch.stack((b.x, 0.5 * b.x)), b.head, b.target, kind, temperature, weights)
    assert max(calls) == 7 and sum(calls) == 2 * T
    torch.testing.assert_close(loss, want)
    for name in ("losses", "alpha", "hit"):
        torch.testing.assert_close(getattr(stats, name), getattr(seen, name))
    for got, wanted in zip(grads(loss, b), grads(want, a)):
        torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        assert torch.equal(head_loss(b.x, b.head, b.target, kind, temperature)[1].losses, stats.losses[0])


def test_kernels_are_for_gpus_and_what_they_were_written_for():
    a = problem()
    assert losses.kernel_rows(a.x, a.target, 1.0, V) == (None, losses.LOGIT_ROWS)


@pytest.mark.parametrize("kind", ("ce", "kl", "log_alpha"))
@pytest.mark.parametrize("temperature", (0.0, 0.5, 1.7))
def test_finite_differences(kind, temperature):
    a = problem(rows=5, vocab=7, width=3)
    assert gradcheck(
        lambda x, head: head_loss(x, head, a.target, kind, temperature, a.weights, chunk=2)[0], (a.x, a.head)
    )


@pytest.mark.parametrize("temperature", (0.0, 0.5, 1.7))
def test_finite_differences_of_lk_with_its_blend_held_still(temperature):
    a = problem(rows=5, vocab=7, width=3)
    p = target_probs(a.target, temperature)
    blend = (-LK_DECAY * plain("kl", a, temperature)[2].detach()).exp()

    def held(x):
        kl, alpha = plain_loss("kl", p, F.linear(x, a.head), temperature or 1.0)
        return (a.weights * (blend * kl + (1 - blend) * (1 - alpha))).sum() / a.weights.sum()

    got = grads(head_loss(a.x, a.head, a.target, "lk", temperature, a.weights, chunk=2)[0], a)[0]
    step = 1e-6
    with torch.no_grad():
        for i, j in itertools.product(range(5), range(3)):
            bump = torch.zeros_like(a.x)
            bump[i, j] = step
            slope = (held(a.x + bump) - held(a.x - bump)) / (2 * step)
            assert math.isclose(float(got[i, j]), float(slope), abs_tol=1e-8), (i, j)


@pytest.mark.parametrize("kind", KINDS)
def test_views_share_one_target(kind):
    a = problem(views=(3,))
    loss, stats = head_loss(a.x, a.head, a.target, kind, 0.8, a.weights, chunk=8)
    apart = [
        head_loss(x, a.head, a.target, kind, 0.8, w, denominator=a.weights.sum(), chunk=5)
        for x, w in zip(a.x, a.weights)
    ]
    torch.testing.assert_close(loss, sum(part for part, _ in apart))
    torch.testing.assert_close(stats.alpha, torch.stack([s.alpha for _, s in apart]))
    assert stats.hit.shape == stats.losses.shape == (3, T)
    for got, want in zip(grads(loss, a), grads(sum(part for part, _ in apart), a)):
        torch.testing.assert_close(got, want)


def test_views_read_each_target_chunk_once():
    a, spans = problem(views=(4,)), []

    class Counting:
        def read(self, span, temperature):
            spans.append(span)
            return a.target.read(span, temperature)

    head_loss(a.x, a.head, Counting(), "kl", 1.0, chunk=10)
    assert [s.start for s in spans] == [0, 10, 20, 30]


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_sum_to_the_whole(kind):
    """Gradient accumulation and ranks: the denominator is the global weight, whatever each part weighs."""
    a = problem()
    whole = head_loss(a.x, a.head, a.target, kind, 1.0, a.weights)[0]
    parts = [
        head_loss(
            a.x[span],
            a.head,
            HiddenTarget(a.target.hidden[span], a.target.head),
            kind,
            1.0,
            a.weights[span],
            a.weights.sum(),
        )[0]
        for span in (slice(0, 5), slice(5, 30), slice(30, T))
    ]
    torch.testing.assert_close(sum(parts), whole)
    for got, want in zip(grads(3 * sum(parts), a), grads(whole, a)):
        torch.testing.assert_close(got, 3 * want)


def test_no_weight_is_no_loss():
    a = problem()
    loss, _ = head_loss(a.x, a.head, a.target, "log_alpha", 1.0, torch.zeros(T))
    assert loss == 0
    assert all((g == 0).all() for g in grads(loss, a))


def test_a_weightless_row_changes_nothing():
    a = problem()
    want = grads(head_loss(a.x, a.head, a.target, "lk", 1.0, a.weights)[0], a)
    silent = (a.weights == 0)[:, None]
    assert silent.any()
    moved = torch.where(silent, a.x.detach() + 3, a.x.detach()).requires_grad_()
    b = SimpleNamespace(x=moved, head=a.head)
    got = grads(head_loss(moved, a.head, a.target, "lk", 1.0, a.weights)[0], b)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert (got[0][silent[:, 0]] == 0).all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_one_hot_target_makes_log_alpha_and_kl_cross_entropy(temperature):
    a = problem(dtype=torch.float32)
    a.target = HiddenTarget(a.target.hidden * 4000, a.target.head)
    assert target_probs(a.target, temperature).max(-1).values.min() == 1
    ce, stats = head_loss(a.x, a.head, a.target, "ce", temperature)
    for kind in ("log_alpha", "kl"):
        loss, other = head_loss(a.x, a.head, a.target, kind, temperature)
        torch.testing.assert_close(loss, ce)
        torch.testing.assert_close(other.alpha, stats.alpha)
        for got, want in zip(grads(loss, a), grads(ce, a)):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_greedy_serving_is_cross_entropy():
    a = problem()
    logits = F.linear(a.target.hidden, a.target.head)
    expected = F.cross_entropy(F.linear(a.x, a.head), logits.argmax(-1))
    for target, kind in itertools.product(
        (a.target, ArgmaxTarget(logits.argmax(-1).int()), TopKTarget(*logits.topk(3)[::-1], 1.0)),
        ("ce", "kl", "log_alpha"),
    ):
        loss, stats = head_loss(a.x, a.head, target, kind, 0.0)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(stats.alpha, (-stats.losses).exp())


@pytest.mark.parametrize("kind", ("kl", "log_alpha", "lk"))
def test_gradient_is_zero_where_drafter_equals_target(kind):
    a = problem(dtype=torch.float32)
    x, head = a.target.hidden.clone().requires_grad_(), a.target.head.clone().requires_grad_()
    loss, stats = head_loss(x, head, a.target, kind, 1.0)
    torch.testing.assert_close(stats.alpha, torch.ones(T))
    assert loss.abs() < 1e-6
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (x, head)))


def test_stats_are_the_acceptances():
    a = problem(seed=3)
    drafted, targeted = F.linear(a.x, a.head), F.linear(a.target.hidden, a.target.head)
    hits = drafted.argmax(-1) == targeted.argmax(-1)
    assert hits.any() and not hits.all()
    for kind, temperature in itertools.product(KINDS, TEMPERATURES):
        stats = head_loss(a.x, a.head, a.target, kind, temperature, chunk=9)[1]
        q, p = (drafted / temperature).softmax(-1), (targeted / temperature).softmax(-1)
        torch.testing.assert_close(stats.alpha, torch.minimum(p, q).sum(-1).detach())
        assert torch.equal(stats.hit, hits)
        assert not stats.alpha.requires_grad
    stats = head_loss(a.x, a.head, ArgmaxTarget(targeted.argmax(-1)), "ce", 0.5)[1]
    torch.testing.assert_close(
        stats.alpha, (drafted / 0.5).softmax(-1).gather(-1, targeted.argmax(-1)[:, None])[:, 0].detach()
    )
