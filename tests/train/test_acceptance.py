"""Acceptance without a rollout: the replayed grid is what decoding does."""

import itertools
import math

import pytest

from bdcli.cache.full import FullCache
from bdcli.cache.selection import Window, parse_selection
from bdcli.results.metrics import RoundFigures, looped_tokens, mark_loops
from bdcli.speculation.draft_length import FixedGamma
from bdcli.speculation.drafter import ModelDrafter
from bdcli.speculation.runner import Runner
from bdcli.speculation.sampling import Sampling
from bdcli.speculation.speculator import Speculator
from bdcli.train.acceptance import Passage, accept_probabilities, acceptance_cell, replay, text_probs
from tests.support.models import tiny_model
from tests.support.training import cache_of


@pytest.mark.parametrize("budget", [None, 64, 200])
@pytest.mark.parametrize("gamma", [1, 4, 7])
def test_the_replayed_grid_is_what_decoding_does(gamma, budget, pocket, text_ids):
    target, drafter, _ = pocket
    prompt, new = text_ids[3000:3301], 60
    selection = parse_selection(budget, gamma=gamma)
    reader = ModelDrafter(Runner(drafter, cache_of(drafter, selection, len(prompt) - 1, 400)))
    engine = Speculator(Runner(target, FullCache(target, 400)), reader, Sampling(), 0)
    engine.prefill(prompt)
    steps = list(engine.rounds(new, frozenset(), FixedGamma(gamma)))
    passage = Passage("x", tuple(prompt), tuple(engine.new_tokens), new)
    found = accept_probabilities(drafter, passage, selection)
    looped = looped_tokens(prompt, engine.new_tokens)
    played = replay(found, gamma, new, looped)
    assert (played.drafted, played.accepted, played.rounds) == (
        sum(s.drafted for s in steps),
        sum(s.accepted for s in steps),
        len(steps),
    )
    told = [RoundFigures(len(s.tokens), s.drafted, s.accepted, 1.0) for s in steps]
    clean = [r for r in mark_loops(prompt, engine.new_tokens, told) if not r.looped]
    assert (played.clean_drafted, played.clean_accepted) == (
        sum(r.drafted for r in clean),
        sum(r.accepted for r in clean),
    )
    assert 0 < played.accepted < played.drafted


def test_replay_by_hand():
    played = replay([1, 1, 0, 1, 0, 1], gamma=2, limit=6, looped=[False] * 3 + [True] * 3)
    # rounds: TT + one more (at 2), T + recovered (at 4), the last token alone
    assert (played.rounds, played.drafted, played.accepted) == (3, 2 + 2 + 0, 2 + 1)
    assert (played.clean_drafted, played.clean_accepted) == (2, 2)


@pytest.mark.parametrize("gamma", [1, 3])
def test_expected_counts_are_the_mean_over_outcomes(gamma):
    """Chances c: the replay must give the average over all 2^n outcomes, each weighted by its probability."""
    odds, limit = [0.9, 0.2, 0.5, 0.7, 0.0, 1.0, 0.4], 9
    mean = dict.fromkeys(("rounds", "drafted", "accepted"), 0.0)
    for outcome in itertools.product((0, 1), repeat=len(odds)):
        weight = math.prod(c if o else 1 - c for c, o in zip(odds, outcome))
        played = replay(outcome, gamma, limit)
        for name in mean:
            mean[name] += weight * getattr(played, name)
    expected = replay(odds, gamma, limit)
    assert {name: getattr(expected, name) for name in mean} == pytest.approx(mean)


@pytest.mark.parametrize("budget", [None, 64])
def test_the_sampled_grid_is_what_sampling_does(budget):
    """Acceptance of many sampled decodings lies around what replaying their own texts expects."""
    target, drafter, limit, warm = (
        tiny_model(seed=1, spread=0.2),
        tiny_model(layers=1, seed=2, spread=0.2),
        24,
        Sampling(0.9),
    )
    prompt, selection = [i * 7 % 41 for i in range(90)], parse_selection(budget, gamma=3)
    drafted = accepted = expected = squares = 0.0
    for seed in range(150):
        reader = ModelDrafter(Runner(drafter, cache_of(drafter, selection, len(prompt) - 1, 130)))
        engine = Speculator(Runner(target, FullCache(target, 130)), reader, warm, seed)
        engine.prefill(prompt)
        steps = list(engine.rounds(limit, frozenset(), FixedGamma(3)))
        text = engine.new_tokens
        passage = Passage("x", tuple(prompt), tuple(text), limit, tuple(text_probs(target, prompt, text, warm)))
        played = replay(accept_probabilities(drafter, passage, selection, warm), 3, limit)
        drafted, accepted = drafted + sum(s.drafted for s in steps), accepted + sum(s.accepted for s in steps)
        gap = sum(s.accepted for s in steps) - played.accepted
        expected, squares = expected + played.accepted, squares + gap * gap
    assert abs(accepted - expected) < 3.5 * squares**0.5 and 0.1 < accepted / drafted < 0.9


def test_interval_covers_the_rate(pocket, text_ids):
    passages = [
        Passage("x", tuple(text_ids[s : s + 100]), tuple(text_ids[s + 100 : s + 140]), 40) for s in range(0, 5000, 900)
    ]
    cell = acceptance_cell(pocket[1], passages, Window(64, gamma=3), 3)
    assert cell.low <= cell.acceptance_rate <= cell.high and cell.passages == 6


@pytest.mark.parametrize("select", ["window", "chunk"])
def test_prompts_about_as_long_as_the_budget_are_measured(select):
    target, drafter, selection = tiny_model(seed=1), tiny_model(layers=1, seed=2), parse_selection(64, select, gamma=4)
    for length in (46, 47, 48, 49, 60, 63, 64, 65, 66):
        prompt = [i * 7 % 41 for i in range(length)]
        reader = ModelDrafter(Runner(drafter, cache_of(drafter, selection, length - 1, 130)))
        engine = Speculator(Runner(target, FullCache(target, 130)), reader, Sampling(), 0)
        engine.prefill(prompt)
        steps = list(engine.rounds(20, frozenset(), FixedGamma(4)))
        found = accept_probabilities(drafter, Passage("x", tuple(prompt), tuple(engine.new_tokens), 20), selection)
        assert replay(found, 4, 20).accepted == sum(s.accepted for s in steps)
        assert engine.drafter.peak_entries <= 64
