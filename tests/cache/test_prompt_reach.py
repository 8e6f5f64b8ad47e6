"""A windowed cache reads only what it can see of a prompt, and holds afterwards what a whole reading leaves."""

from __future__ import annotations

import pytest
import torch

from bdcli.backends.select import static_backend
from bdcli.cache.budget import BudgetCache
from bdcli.cache.kinds import TORCH_CACHES
from bdcli.cache.view import View
from tests.support.cli import compiled_only
from tests.support.models import tiny_model

FRESH = torch.Generator()
FRESH.seed()


def kinds(name):
    if name == "torch":
        return TORCH_CACHES
    if name == "static":
        return static_backend("static", "plain operations").caches
    from bdcli.backends.cpu.caches import PANEL_CACHES

    return PANEL_CACHES


def caches(model, view, prompt, name="torch"):
    """A cache that reads what it needs and one that reads everything, both after `prompt`; blocks that each planned."""
    found, planned = [], []
    for whole in (False, True):
        cache = kinds(name).budget(model, len(prompt) + 40, view)
        starts, plan = [], cache.plan

        def counted(start, rows, plan=plan, starts=starts):
            starts.append(start)
            return plan(start, rows)

        cache.plan = counted
        if whole:
            cache.prompt_needs = lambda _layer: (0, 0)
        model.prefill(prompt, cache)
        found.append(cache)
        planned.append(starts)
    return found, planned


def assert_same(ours, whole):
    assert (ours.length, ours.peak_entries, ours._oldest, ours._written, ours._prompt) == (
        *(whole.length, whole.peak_entries, whole._oldest, whole._written),
        None,
    )
    for mine, its in zip(ours.storage, whole.storage):
        assert torch.equal(mine, its)


def tokens(length):
    return torch.randint(41, (length,), generator=FRESH).tolist()


@pytest.mark.parametrize("rebased", [True, False])
@pytest.mark.parametrize(
    ("layers", "budget", "sinks", "gamma_max"), [(1, 24, 4, 5), (2, 17, 1, 3), (3, 33, 0, 4), (5, 12, 2, 1)]
)
def test_what_is_held_is_bit_for_bit_that_of_a_whole_reading(layers, budget, sinks, gamma_max, rebased, monkeypatch):
    monkeypatch.setattr("bdcli.model.llama.PREFILL_BLOCK", 16)
    model, view = tiny_model(layers=layers, seed=layers, kv_heads=2), View(budget, sinks, 0, gamma_max, rebased)
    reach = view.reach(layers - 1)
    borders = {1, sinks or 1, budget, view.window, reach + sinks, reach + 16, reach + 32, reach + 48}
    for length in sorted({b + d for b in borders for d in (-1, 0, 1) if b + d > 0} | {reach + 200}):
        prompt = tokens(length)
        (ours, whole), (some, every) = caches(model, view, prompt)
        assert_same(ours, whole)
        assert length < reach + 48 or len(some) < len(every)
        for block in ([3], [1, 4, 1], [5]):
            assert torch.equal(*(model.forward(block, cache, len(block)) for cache in (ours, whole)))


def test_what_is_read_does_not_grow_with_the_prompt(monkeypatch):
    monkeypatch.setattr("bdcli.model.llama.PREFILL_BLOCK", 16)
    model, view = tiny_model(layers=3), View(40, 4, 0, 5, True)
    read = [len(caches(model, view, tokens(length))[1][0]) for length in (400, 560, 1200)]
    assert len(set(read)) == 1
    blocks = sum(1 + -(-view.reach(above) // 16) + 1 for above in range(3))  # sinks' block, and one cut by the border
    assert read[0] <= blocks


def test_blocks_of_512_rows_and_several_threads():
    model, view = tiny_model(layers=2, heads=6, kv_heads=2, dim=32, hidden=96, inner=160), View(300, 4, 0, 16, True)
    (ours, whole), (some, every) = caches(model, view, tokens(2700))
    assert_same(ours, whole)
    assert (len(some), len(every)) == (3 + 3, 12)


@pytest.mark.parametrize("name", ["static", pytest.param("compiled", marks=compiled_only)])
@pytest.mark.parametrize("rebased", [True, False])
def test_caches_of_the_other_backends(name, rebased, monkeypatch):
    monkeypatch.setattr("bdcli.model.llama.PREFILL_BLOCK", 16)
    model = tiny_model(layers=3, dim=32, hidden=64, inner=96)
    (ours, whole), (some, every) = caches(model, View(40, 4, 0, 5, rebased), tokens(333), name)
    assert_same(ours, whole)
    assert len(some) < len(every)


def test_chosen_chunks_need_the_whole_prompt():
    cache = BudgetCache(tiny_model(), 300, View(48, 4, 16, 5, True))
    cache.begin_prefill(250)
    assert cache.prompt_needs(0) == cache.prompt_needs(1) == (0, 0)
