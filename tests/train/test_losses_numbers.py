"""Losses stay exact at extreme logits and in low precision, finite, and small in memory."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bdcli.train.losses import KINDS, head_loss, plain_loss
from bdcli.train.targets import HiddenTarget
from tests.support.losses import TEMPERATURES, T, grads, plain, problem, target_probs


def identity(logits, seed_logits, dtype=torch.float32):
    """A problem whose drafter and target logits are given: hidden states are logits, heads are the identity."""
    eye = torch.eye(logits.shape[-1], dtype=dtype)
    return SimpleNamespace(
        x=logits.to(dtype).requires_grad_(), head=eye, target=HiddenTarget(seed_logits.to(dtype), eye.clone())
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", (0.0, *TEMPERATURES))
def test_extreme_logits_stay_exact(kind, temperature):
    """Up to 320 nats apart: α is below the smallest fp32, its logarithm and gradients are still those of fp64."""
    g = torch.Generator().manual_seed(1)
    drafted, targeted = (80 * torch.randn(8, 13, generator=g).sign() for _ in range(2))
    drafted[0], targeted[0] = -80, -80
    drafted[0, 1], targeted[0, 2] = 80, 80  # disjoint
    drafted[1] = targeted[1]
    a = identity(drafted, targeted)
    b = identity(drafted, targeted, torch.float64)
    loss, stats = head_loss(a.x, a.head, a.target, kind, temperature)
    losses, alpha = plain_loss(kind, target_probs(b.target, temperature), b.x, temperature or 1.0)
    torch.testing.assert_close(stats.losses.double(), losses.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.alpha.double(), alpha.detach(), rtol=1e-5, atol=1e-6)
    (got,), (want,) = torch.autograd.grad(loss, a.x), torch.autograd.grad(losses.mean(), b.x)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    if kind != "lk":
        assert want[0].abs().max() > 1e-3  # disjoint distributions are still taught


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", (0.0, 1.0))
def test_bf16_is_as_close_as_eager_bf16(kind, temperature):
    low = problem(rows=128, vocab=200, dtype=torch.bfloat16, width=32, spread=0.5)
    low.target = HiddenTarget(low.target.hidden.float(), low.target.head.float())  # no tied argmax flips: p is given
    high = SimpleNamespace(
        x=low.x.detach().double().requires_grad_(),
        head=low.head.detach().double().requires_grad_(),
        target=low.target,
        weights=low.weights,
    )
    exact_loss = plain(kind, high, temperature)[0]
    exact = grads(exact_loss, high)
    p = target_probs(low.target, temperature).float()
    eager_losses, _ = plain_loss(kind, p, F.linear(low.x, low.head).float(), temperature or 1.0)
    eager = grads((low.weights * eager_losses).sum() / low.weights.sum(), low)
    loss, _ = head_loss(low.x, low.head, low.target, kind, temperature, low.weights, chunk=30)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-2, atol=1e-3)
    for got, low_grad, want in zip(grads(loss, low), eager, exact):
        assert got.dtype == torch.bfloat16
        error, eager_error = ((g.double() - want).norm() for g in (got, low_grad))
        assert error < 1.5 * eager_error < 0.2 * want.norm()


def test_bf16_rows_through_an_fp32_head_leave_an_fp32_gradient():
    a = problem(dtype=torch.float32)
    narrow = a.x.detach().bfloat16().requires_grad_()
    want = grads(head_loss(a.x, a.head, a.target, "kl", 1.0)[0], a)[1]
    loss, _ = head_loss(narrow, a.head, a.target, "kl", 1.0, chunk=5)
    got_x, got = torch.autograd.grad(loss, (narrow, a.head))
    assert (got_x.dtype, got.dtype) == (torch.bfloat16, torch.float32)
    assert not torch.equal(got, got.bfloat16().float())
    assert (got - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", (0.0, 1.0))
def test_nan_is_neither_accepted_nor_hidden(kind, temperature):
    for side in ("drafter", "target"):
        a = problem(dtype=torch.float32)
        a.target.head[0] *= 5
        a.target.hidden[4] = a.target.head[0]  # both like token 0 here, which is also where an argmax of NaN leads
        a.x.data.copy_(a.target.hidden)
        a.head.data.copy_(a.target.head)
        (a.x.data if side == "drafter" else a.target.hidden)[4] = torch.nan
        loss, stats = head_loss(a.x, a.head, a.target, kind, temperature)
        assert loss.isnan()
        assert stats.losses.isnan().nonzero().tolist() == stats.alpha.isnan().nonzero().tolist() == [[4]]
        assert stats.hit.logical_not().nonzero().tolist() == [[4]]


def allocations(rows, call):
    """(largest allocation, most alive at a time) in fp32 numbers, while `call(problem)` makes a loss and gradients."""
    a = problem(rows=rows, vocab=500, dtype=torch.float32, width=4)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        call(a).backward()
    events = [e for e in watch.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() // 4 for e in sorted(events, key=lambda e: e.start_ns())]
    return max(sizes), max(itertools.accumulate(sizes))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", (0.0, 0.7))
def test_no_tensor_outgrows_one_chunk(kind, temperature):
    chunk = 16

    def fused(a):
        return head_loss(a.x, a.head, a.target, kind, temperature, a.weights, chunk=chunk)[0]

    (largest, peak), (short_largest, short_peak) = allocations(512, fused), allocations(64, fused)
    assert largest == short_largest == chunk * 500
    assert peak <= 9 * chunk * 500
    assert peak - short_peak <= (512 - 64) * 20  # a few numbers a row
    assert allocations(512, lambda a: plain(kind, a, temperature)[0])[0] >= 512 * 500


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_made_only_where_wanted(kind):
    """Products of a chunk: drafter logits, target logits, ∂x, ∂head."""
    values = []
    for x_learns, head_learns, grad_mode, products in [
        (True, True, True, 4),
        (True, False, True, 3),
        (False, True, True, 3),
        (False, False, True, 2),
        (True, True, False, 2),
    ]:
        a = problem()
        a.x.requires_grad_(x_learns)
        a.head.requires_grad_(head_learns)
        with torch.set_grad_enabled(grad_mode), Products() as made:
            loss, _ = head_loss(a.x, a.head, a.target, kind, 1.0, chunk=T)
        assert made.count == products
        assert loss.requires_grad == (products > 2)
        if loss.requires_grad:
            loss.backward()
            assert (a.x.grad is not None, a.head.grad is not None) == (x_learns, head_learns)
        values.append(float(loss.detach()))
    assert len(set(values)) == 1
