"""Acceptance losses: equal to the plain law and to finite differences, whatever the chunk; finite; small in memory."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bdcli.base.errors import UserError
from bdcli.train import losses
from bdcli.train.losses import (
    KINDS,
    LK_DECAY,
    ArgmaxTarget,
    HiddenTarget,
    TopKTarget,
    accepted_length_weights,
    head_loss,
    plain_loss,
)

T, V = 37, 61
TEMPERATURES = (0.5, 1.0, 1.7)


def problem(rows=T, vocab=V, dtype=torch.float64, seed=0, width=11, spread=0.7, views=()):
    """A drafter that half agrees with its target, and row weights of which a third are 0."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    hidden, target_head = normal(rows, width), normal(vocab, width) * spread
    x = (hidden + normal(*views, rows, width)).requires_grad_()
    head = (target_head + 0.3 * normal(vocab, width)).requires_grad_()
    weights = torch.rand(*views, rows, generator=g) * (torch.rand(*views, rows, generator=g) > 1 / 3)
    return SimpleNamespace(x=x, head=head, target=HiddenTarget(hidden, target_head), weights=weights)


def target_probs(target, temperature):
    logits = F.linear(target.hidden, target.head)
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    return (logits / temperature).softmax(-1)


def law(kind, a, temperature):
    """(weighted mean loss, ℓ, α) by the plain twin and autograd."""
    losses, alpha = plain_loss(kind, target_probs(a.target, temperature), F.linear(a.x, a.head), temperature or 1.0)
    weights = a.weights.to(losses.dtype)
    return (weights * losses).sum() / weights.sum(), losses, alpha


def grads(loss, a):
    return torch.autograd.grad(loss, (a.x, a.head), retain_graph=True)


def identity(logits, seed_logits, dtype=torch.float32):
    """A problem whose drafter and target logits are given: hidden states are logits, heads are the identity."""
    eye = torch.eye(logits.shape[-1], dtype=dtype)
    return SimpleNamespace(
        x=logits.to(dtype).requires_grad_(), head=eye, target=HiddenTarget(seed_logits.to(dtype), eye.clone())
    )


def test_the_law_by_hand():
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.4, 0.5, 0.1]])
    kl, overlap = 0.7 * math.log(0.7 / 0.4) + 0.2 * math.log(0.2 / 0.5), 0.7
    blend = math.exp(-3 * 0.7)
    expected = {"ce": -math.log(0.4), "kl": kl, "log_alpha": -math.log(0.7), "lk": blend * kl + (1 - blend) * 0.3}
    for kind, value in expected.items():
        losses, alpha = plain_loss(kind, p, 2 * q.log(), 2.0)
        assert float(losses) == pytest.approx(value, rel=1e-5)
        assert float(alpha) == pytest.approx(overlap, rel=1e-5)


# -- values and gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", (0.0, *TEMPERATURES))
def test_equal_to_the_law_at_every_chunk(kind, temperature):
    for seed, (dtype, tolerance) in enumerate([(torch.float64, 1e-11), (torch.float32, 2e-5)]):
        a = problem(dtype=dtype, seed=seed)
        expected, losses, alpha = law(kind, a, temperature)
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
    blend = (-LK_DECAY * law("kl", a, temperature)[2].detach()).exp()

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


# -- identities --------------------------------------------------------------------------------------------------


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


# -- cached targets ----------------------------------------------------------------------------------------------


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
    """Its law: KL, α and LK over k + 1 outcomes."""
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
    exact = law("kl", a, 1.0)[2].detach()
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


# -- numbers -----------------------------------------------------------------------------------------------------


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
    exact_loss = law(kind, high, temperature)[0]
    exact = grads(exact_loss, high)
    p = target_probs(low.target, temperature).float()
    eager_losses, _ = plain_loss(kind, p, F.linear(low.x, low.head).float(), temperature or 1.0)
    eager = grads((low.weights * eager_losses).sum() / low.weights.sum(), low)
    loss, _ = head_loss(low.x, low.head, low.target, kind, temperature, low.weights, chunk=30)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-2, atol=1e-3)
    for got, plain, want in zip(grads(loss, low), eager, exact):
        assert got.dtype == torch.bfloat16
        error, eager_error = ((g.double() - want).norm() for g in (got, plain))
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


# -- memory and work ---------------------------------------------------------------------------------------------


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
    assert allocations(512, lambda a: law(kind, a, temperature)[0])[0] >= 512 * 500


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


# -- accepted length ---------------------------------------------------------------------------------------------


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
    alpha = law("kl", a, temperature)[2]
    want = grads(-expected_length(alpha, gamma), a)
    with torch.no_grad():
        known = head_loss(a.x, a.head, a.target, "log_alpha", temperature)[1].alpha
    weights = accepted_length_weights(known, gamma)
    loss, _ = head_loss(a.x, a.head, a.target, "log_alpha", temperature, weights, 1.0, chunk=10)
    for got, expected in zip(grads(loss, a), want):
        torch.testing.assert_close(got, expected)
