"""The training forward gives the logits of decoding, under every view, and gradients where they are wanted."""

import random

import pytest
import torch

from bdcli.cache.budget import BudgetCache
from bdcli.cache.full import FullCache
from bdcli.cache.selection import parse_selection
from bdcli.cache.view import FULL, View
from bdcli.config.distill import Optimizer
from bdcli.model.rope import RopeTable
from bdcli.train.forward import anchored_hidden, causal_hidden, view_hidden
from bdcli.train.trainer import Trainer
from tests.support.models import tiny_model
from tests.support.training import cache_of


def decode_logits(model, ids, view):
    """Logits of every position as the decode caches give them, one token a forward."""
    cache = FullCache(model, len(ids)) if view is FULL else BudgetCache(model, len(ids), view)
    return torch.cat([model.forward([token], cache, 1) for token in ids])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("rebased", "widest"), [(True, 512), (False, 512), (True, 6), (False, 13)])
def test_training_views_equal_decoding(rebased, widest, kv_heads, monkeypatch):
    monkeypatch.setattr("bdcli.train.forward.MIN_BLOCK", 5)
    monkeypatch.setattr("bdcli.train.forward.MAX_BLOCK", widest)
    rng = random.Random(kv_heads)
    model = tiny_model(layers=2, kv_heads=kv_heads, seed=rng.randrange(99))
    ids = [rng.randrange(41) for _ in range(131)]
    views = [FULL, View(24, 4, 0, 5, rebased), View(60, 1, 0, 3, rebased), View(400, 4, 0, 8, rebased)]
    table = RopeTable(model.config.rope, len(ids), len(ids), torch.float32, "cpu")
    hidden = view_hidden(model, table, torch.tensor(ids), views)
    for view, x in zip(views, hidden):
        want = decode_logits(model, ids, view)
        assert (model.logits(x) - want).abs().max() < 2e-4 * want.abs().max()
    apart = [(hidden[0] - x).abs().max() for x in hidden[1:3]]
    assert min(apart) > 1e-2, "the views would be the same even if the budget were ignored"


def anchored_case(select, positions, budget, kv_heads, start):
    model = tiny_model(layers=2, kv_heads=kv_heads, seed=budget)
    ids = random.Random(budget).choices(range(41), k=start + 30)
    table = RopeTable(model.config.rope, len(ids), len(ids), torch.float32, "cpu")
    return model, ids, table, parse_selection(budget, select, positions, 5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("budget", [40, 64, 104])
@pytest.mark.parametrize(
    ("select", "positions"), [("chunk", "rebased"), ("chunk", "absolute"), ("official", "absolute")]
)
def test_chosen_chunks_in_training_equal_decoding(select, positions, budget, kv_heads):
    start = 150
    model, ids, table, selection = anchored_case(select, positions, budget, kv_heads, start)
    cache = cache_of(model, selection, start, len(ids))
    model.prefill(ids[:start], cache)
    want = torch.cat([model.forward([token], cache, 1) for token in ids[start:]])
    got = model.logits(anchored_hidden(model, table, torch.tensor(ids), start, selection.view(start)))
    assert (got - want).abs().max() < 2e-4 * want.abs().max()
    full = model.logits(view_hidden(model, table, torch.tensor(ids), [FULL])[0, start:])
    assert (got - full).abs().max() > 1e-2, "the view would be the same even if the budget were ignored"


def test_what_the_prefix_learns():
    """none: only what comes after the prefix learns; selected: kept keys too, one layer deep; full: all of it."""
    grads = {}
    for mode in ("none", "selected", "full"):
        model, ids, table, selection = anchored_case("chunk", "rebased", 64, 2, 150)
        ids = torch.arange(180)
        model.embedding = torch.randn(180, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
        anchored_hidden(model, table, ids, 150, selection.view(150), mode).square().sum().backward()
        grads[mode] = model.embedding.grad
    assert not grads["none"][:150].any() and grads["none"][150:].any()
    assert not grads["selected"][:150].any() and grads["full"][:150].any()
    model, ids, table, selection = anchored_case("chunk", "rebased", 64, 2, 150)
    learned = {}
    for mode in ("none", "selected"):
        model.layers[1].qkv = model.layers[1].qkv.detach().requires_grad_()
        anchored_hidden(model, table, torch.tensor(ids), 150, selection.view(150), mode).square().sum().backward()
        learned[mode] = model.layers[1].qkv.grad
    assert (learned["none"] - learned["selected"]).abs().max() > 1e-3


def test_all_weights_get_gradients_through_every_view():
    model = tiny_model(layers=2)
    trainer = Trainer(model, Optimizer())
    table = RopeTable(model.config.rope, 90, 90, torch.float32, "cpu")
    x = view_hidden(model, table, torch.arange(90) % 41, [View(24, 4, 0, 5, True)])
    loss = model.logits(x[0]).square().mean()
    loss.backward()
    assert all(t.grad is not None and bool(t.grad.abs().sum() > 0) for t in trainer.parameters)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_batched_rows_equal_decoding(kv_heads):
    model = tiny_model(kv_heads=kv_heads)
    ids = torch.randint(0, 41, (3, 37), generator=torch.Generator().manual_seed(kv_heads))
    table = RopeTable(model.config.rope, 37, 37, torch.float32, "cpu")
    for row, x in zip(ids, causal_hidden(model, table, ids)):
        want = model.forward(row.tolist(), FullCache(model, 37), 37)
        assert (model.logits(x) - want).abs().max() < 2e-4 * want.abs().max()


def test_a_skip_moves_positions_and_nothing_else():
    """The loss at skipped positions is that of the decode forward fed at those positions."""
    model, ids = tiny_model(layers=2), torch.randint(0, 41, (1, 40))
    rope = RopeTable(model.config.rope, 300, 300, torch.float32, model.device)
    near, gone = torch.arange(40), torch.arange(40)
    gone[25:] += 200
    plain, moved, shifted = (causal_hidden(model, rope, ids, None, p)[0] for p in (near, gone, near + 250))
    torch.testing.assert_close(shifted, plain, rtol=1e-4, atol=1e-4)  # only distances matter
    torch.testing.assert_close(moved[:25], plain[:25])
    assert (moved[25:] - plain[25:]).abs().amax(-1).min() > 1e-4
