"""Prompt lookup: what it proposes, that text stays exact, and that sampling keeps the distribution of the target."""

import random

import pytest

from bdcli.bench.lookup import GRAMS, Lookup
from bdcli.speculation.draft_length import AutoGamma, FixedGamma
from bdcli.speculation.sampling import Sampling
from bdcli.speculation.speculator import Speculator
from tests.speculation import test_speculator as engine_tests
from tests.speculation.test_speculator import SETTINGS, TableRunner, generate, table


def by_definition(ids, gamma):
    for n in GRAMS:
        gram = ids[-n:]
        for start in range(len(ids) - n - 1, -1, -1):
            if len(ids) > n and ids[start : start + n] == gram:
                return ids[start + n : start + n + gamma]
    return []


def test_proposals_match_the_definition_while_the_text_grows():
    rng = random.Random(4)
    for _ in range(40):
        ids = [rng.randrange(rng.choice((3, 12))) for _ in range(rng.randrange(1, 60))]
        lookup = Lookup()
        lookup.prefill(ids[:-1])
        for _ in range(20):
            assert lookup.draft(ids, 4).tokens == by_definition(ids, 4)
            ids += [rng.randrange(5) for _ in range(rng.randrange(1, 5))]


@pytest.mark.parametrize("controller", [FixedGamma(4), AutoGamma(6, {0: 1e-4, 1: 1.2e-4, 6: 2e-4})])
def test_greedy_text_is_the_targets(controller):
    target = table(3)
    plain, _ = generate(target, None, Sampling(), 0, new=80, gamma=0)
    engine = Speculator(TableRunner(target), Lookup(), Sampling(), 0)
    engine.prefill([1, 2])
    steps = list(engine.rounds(80, frozenset(), controller))
    assert engine.new_tokens == plain.new_tokens
    assert sum(s.accepted for s in steps) > 0 and all(s.accepted <= s.drafted for s in steps)


@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
def test_sampled_triples_follow_the_targets_law(sampling, monkeypatch):
    monkeypatch.setattr(engine_tests, "DRAWS", 3_000)
    target = table(1)
    real = engine_tests.Speculator
    monkeypatch.setattr(engine_tests, "Speculator", lambda t, _d, s, seed: real(t, Lookup(), s, seed))
    assert engine_tests.law_p_value(target, target, sampling) > 1e-4


def test_a_target_that_has_read_the_prompt_is_not_read_again():
    engine = Speculator(TableRunner(table(3)), Lookup(), Sampling(), 0)
    engine.prefill([1, 2, 3, 4])
    first = [step.tokens for step in engine.rounds(12, frozenset(), FixedGamma(3))]
    engine.target.rollback(3)
    engine.prefill([1, 2, 3, 4], target_ready=True)
    assert [step.tokens for step in engine.rounds(12, frozenset(), FixedGamma(3))] == first
    with pytest.raises(RuntimeError, match="the target holds"):
        engine.prefill([1, 2, 3, 4], target_ready=True)
