"""The distillation loss: λ, anchors, and weights of positions."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bdcli.cache.selection import Full, parse_selection
from bdcli.config.distill import Views
from bdcli.train.distill.objective import Objective
from bdcli.train.distill.plan import draw_selections
from bdcli.train.forward import final_rows
from bdcli.train.targets import HiddenTarget
from tests.support.training import SMALL_DISTILL, cache_of


def losses_of(pocket, recipe, ids, *selections):
    """Losses of ids under each list of selections, for the pocket pair."""
    target, drafter, _ = pocket
    answers = HiddenTarget(final_rows(target, ids), target.head)
    objective = Objective(recipe, drafter, torch.float32)
    return [float(objective.loss(ids, answers, some, 1)) for some in selections]


def test_lambda_weighs_the_sparse_branch(pocket):
    """λ = 0 must give the full branch alone, and the loss must be linear in λ."""
    ids = torch.arange(192) * 7 % 4096
    selections = draw_selections(SMALL_DISTILL, 0)

    def loss(sparse_weight):
        recipe = replace(SMALL_DISTILL, loss=replace(SMALL_DISTILL.loss, sparse_weight=sparse_weight))
        return losses_of(pocket, recipe, ids, selections, [Full()])

    (zero, full), (one, _), (three, _) = map(loss, (0.0, 1.0, 3.0))
    assert zero == pytest.approx(full, rel=1e-5)
    assert three - zero == pytest.approx(3 * (one - zero), rel=1e-4) and one > zero


@pytest.mark.parametrize("select", ["chunk", "official"])
@pytest.mark.parametrize("teach", ["all", "anchored"])
def test_views_with_chosen_chunks_teach_what_follows_the_anchors(pocket, select, teach):
    """The loss is made of exactly the rows that follow an anchor, as decoding with the chosen view has them."""
    views = Views(
        budgets=(64, 104), select=select, positions="absolute", anchors=(120, 160), anchor_tokens=20, teach=teach
    )
    target, drafter, _ = pocket
    ids = torch.arange(192) * 11 % 4096
    selections = [Full(), parse_selection(64, select, "absolute")]
    (got,) = losses_of(pocket, replace(SMALL_DISTILL, views=views), ids, selections)
    hidden = final_rows(target, ids)

    def mean(start, stop, selection, first):
        cache = cache_of(drafter, selection, first - 1, 192)
        drafter.prefill(ids[: first - 1].tolist(), cache)
        decoded = torch.cat([drafter.forward([t], cache, 1) for t in ids[first - 1 : stop].tolist()])
        p = F.linear(hidden[start:stop], target.head).softmax(-1)
        rows = decoded[start - first + 1 :]
        return float(F.kl_div(rows.log_softmax(-1), p, reduction="none").sum(-1).mean())

    spans = [(119, 139), (159, 179)]
    everywhere, sparse = selections
    full = sum(mean(a, b, everywhere, 1) for a, b in spans) / 2 if teach == "anchored" else mean(0, 192, everywhere, 1)
    after = sum(mean(a, b, sparse, a + 1) for a, b in spans) / 2
    assert got == pytest.approx(full + SMALL_DISTILL.loss.sparse_weight * after, rel=1e-4)


def test_accepted_length_weights_change_the_loss_and_keep_its_scale(pocket):
    ids = torch.arange(192) * 11 % 4096
    losses = {}
    for weights in ("uniform", "accepted_length"):
        recipe = replace(SMALL_DISTILL, loss=replace(SMALL_DISTILL.loss, weights=weights))
        (losses[weights],) = losses_of(pocket, recipe, ids, [Full()])
    assert losses["uniform"] != pytest.approx(losses["accepted_length"], rel=1e-3)
    assert losses["accepted_length"] < losses["uniform"], "accepted positions weigh more and have the smaller loss"
