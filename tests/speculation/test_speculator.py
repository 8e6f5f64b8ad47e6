"""The engine: exact whatever the drafter, stops inside a block, honest failure on NaN, the law of sampling."""

import itertools

import pytest
import torch

from bdcli.base.errors import NonFiniteError
from bdcli.cache.full import FullCache
from bdcli.speculation import speculator as speculate
from bdcli.speculation.baseline import warm_up
from bdcli.speculation.draft_length import AutoGamma, FixedGamma
from bdcli.speculation.drafter import ModelDrafter
from bdcli.speculation.runner import Runner
from bdcli.speculation.sampling import Sampling, Verdict, draw, verify_greedy, verify_sampled
from bdcli.speculation.speculator import Speculator
from tests.support.models import tiny_model
from tests.support.statistics import p_value

V = 5
CPU = torch.Generator().manual_seed(0)


class TableRunner(Runner):
    """An order-2 model: the next token's logits depend on the last two."""

    length = 0

    def __init__(self, logits):
        self.table = logits  # [V, V, V]
        self.ids, self.vocab = [], V

    def prefill(self, tokens, _on_block=None):
        self.ids, self.length = list(tokens), len(tokens)

    def feed(self, tokens, rows):
        self.ids = self.ids[: self.length] + list(tokens)
        self.length = len(self.ids)
        last = range(len(self.ids) - rows, len(self.ids))
        return torch.stack([self.table[self.ids[i - 1], self.ids[i]] for i in last])

    def rollback(self, length):
        self.length = min(self.length, length)

    @classmethod
    def feed_together(cls, runners, tokens, rows):
        return [runner.feed(*work) for runner, *work in zip(runners, tokens, rows)]


def table_drafter(logits):
    return ModelDrafter(TableRunner(logits))


def table(seed, sharpness=2.0):
    return torch.randn(V, V, V, generator=torch.Generator().manual_seed(seed)) * sharpness


def generate(target, drafter, sampling, seed, new=3, gamma=2, eos=frozenset(), prompt=(1, 2)):
    engine = Speculator(TableRunner(target), None if drafter is None else table_drafter(drafter), sampling, seed)
    engine.prefill(list(prompt))
    steps = list(engine.rounds(new, eos, FixedGamma(gamma)))
    return engine, steps


def disagreeing(target):
    """A drafter whose favourite is always the target's least likely token."""
    return -3 * target


DRAFTERS = {
    "agrees": lambda t: t.clone(),
    "half": lambda t: torch.where(torch.arange(V)[:, None, None] % 2 == 0, t, table(99)),
    "never": disagreeing,
}
SETTINGS = {
    "t0.5": Sampling(temperature=0.5),
    "t1": Sampling(temperature=1.0),
    "top-p": Sampling(temperature=1.0, top_p=0.8),
}
DRAWS = 20_000


def joint_law(target, sampling, prompt=(1, 2)):
    """Exact probability of each triple of tokens after the prompt, straight from the definition."""
    law = {}
    for triple in itertools.product(range(V), repeat=3):
        p, (a, b) = 1.0, prompt
        for token in triple:
            p *= float(sampling.distribution(target[a, b][None])[0, token])
            a, b = b, token
        law[triple] = p
    return law


def law_p_value(target, drafter, sampling):
    """Chi-square p-value of the triples the engine emits against the target's joint law; rare cells are pooled."""
    engine = Speculator(TableRunner(target), table_drafter(drafter), sampling, seed=7)
    counts = dict.fromkeys(itertools.product(range(V), repeat=3), 0)
    controller = FixedGamma(2)
    for _ in range(DRAWS):
        engine.prefill([1, 2])
        for _step in engine.rounds(3, frozenset(), controller):
            pass
        counts[tuple(engine.new_tokens)] += 1
    law = joint_law(target, sampling)
    assert all(counts[t] == 0 for t, p in law.items() if p == 0), "a token outside the support was emitted"
    big = [t for t, p in law.items() if p * DRAWS >= 5]
    seen, expected = [counts[t] for t in big], [law[t] * DRAWS for t in big]
    if DRAWS - sum(expected) > 1e-6:
        seen, expected = [*seen, DRAWS - sum(seen)], [*expected, DRAWS - sum(expected)]
    return p_value(seen, expected)


@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)
def test_sampled_triples_follow_the_targets_law(drafter, sampling):
    target = table(1)
    assert law_p_value(target, drafter(target), sampling) > 1e-4


def test_the_law_test_catches_a_biased_verify(monkeypatch):
    """Accept with probability p and resample from p: a plausible mistake, which must not pass."""

    def biased(draft, _q, p, generator):
        for i, token in enumerate(draft):
            if float(torch.rand((), generator=generator)) >= float(p[i, token]):
                return Verdict([*draft[:i], draw(p[i], generator)], i)
        return Verdict([*draft, draw(p[len(draft)], generator)], len(draft))

    monkeypatch.setattr(speculate, "verify_sampled", biased)
    target = table(1)
    assert law_p_value(target, DRAFTERS["half"](target), SETTINGS["t1"]) < 1e-6


@pytest.mark.parametrize("gamma", [1, 2, 3, 7])
@pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)
def test_greedy_equals_autoregressive(drafter, gamma):
    target = table(3)
    plain, _ = generate(target, None, Sampling(), 0, new=40, gamma=0)
    fast, steps = generate(target, drafter(target), Sampling(), 0, new=40, gamma=gamma)
    assert fast.new_tokens == plain.new_tokens
    assert sum(len(s.tokens) for s in steps) == 40
    accepted, drafted = sum(s.accepted for s in steps), sum(s.drafted for s in steps)
    rate = {"agrees": accepted == drafted, "half": 0 < accepted < drafted, "never": accepted == 0}
    name = next(n for n, make in DRAFTERS.items() if make is drafter)
    assert drafted > 0 and rate[name]
    assert all(len(s.tokens) == s.accepted + 1 for s in steps)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drafter_equal_to_the_target_is_always_accepted(temperature):
    target = table(5)
    _, steps = generate(target, target.clone(), Sampling(temperature=temperature), 3, new=60, gamma=4)
    assert sum(s.accepted for s in steps) == sum(s.drafted for s in steps) > 0


def test_never_past_the_limit_and_never_past_eos():
    target = table(3)
    free, _ = generate(target, target.clone(), Sampling(), 0, new=30, gamma=6)
    assert free.finish_reason == "length"
    for limit in range(1, 12):
        engine, steps = generate(target, target.clone(), Sampling(), 0, new=limit, gamma=6)
        assert engine.new_tokens == free.new_tokens[:limit]
        assert sum(s.drafted for s in steps) < limit + len(steps)
    inside = free.new_tokens[3]  # with γ = 6 this token stands inside an accepted block
    cut, steps = generate(target, target.clone(), Sampling(), 0, new=30, gamma=6, eos=frozenset({inside}))
    assert cut.new_tokens == free.new_tokens[: free.new_tokens.index(inside) + 1]
    assert cut.finish_reason == "stop" and steps[-1].tokens[-1] == inside
    assert all(s.accepted <= len(s.tokens) for s in steps)


def test_the_same_seed_gives_the_same_text_and_another_one_does_not():
    target, drafter = table(1), DRAFTERS["half"](table(1))
    texts = [generate(target, drafter, Sampling(temperature=1.0), seed, new=40)[0].new_tokens for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", ["target", "drafter"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_logits_stop_the_run(broken, value, temperature):
    """NaN on both sides must not become token 0 and an acceptance."""
    bad = table(1)
    bad[..., 2] = value
    target, drafter = (bad, table(1)) if broken == "target" else (table(1), bad)
    with pytest.raises(NonFiniteError, match=broken):
        generate(target, drafter, Sampling(temperature=temperature), 0, new=20)


def test_an_interrupted_round_leaves_only_accepted_tokens():
    target = table(1)
    engine = Speculator(TableRunner(target), table_drafter(target), Sampling(), 0)
    engine.prefill([1, 2])
    engine.round(2)
    kept = list(engine.ids)

    def interrupt(*_):
        raise KeyboardInterrupt

    engine.target.feed = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.round(2)
    assert engine.ids == kept


def test_verify_greedy_by_hand():
    logits = torch.eye(4)[[2, 0, 3]]
    assert verify_greedy([2, 0], logits) == Verdict([2, 0, 3], 2)
    assert verify_greedy([2, 1], logits) == Verdict([2, 0], 1)
    assert verify_greedy([0, 0], logits) == Verdict([2], 0)
    assert verify_greedy([], logits[:1]) == Verdict([2], 0)


def test_the_residual_never_emits_what_the_drafter_overrates():
    p, q = torch.tensor([[0.2, 0.8], [0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    for _ in range(200):
        verdict = verify_sampled([0], q, p, CPU)
        assert verdict.accepted == 1 or verdict.tokens == [1]


def test_serving_distribution_matches_transformers():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(6, 33, generator=torch.Generator().manual_seed(2)) * 3
    want = TemperatureLogitsWarper(0.7)(None, logits)
    want = TopPLogitsWarper(0.85)(None, TopKLogitsWarper(11)(None, want)).softmax(-1)
    got = Sampling(0.7, 11, 0.85).distribution(logits)
    assert torch.allclose(got, want, atol=1e-6)
    assert torch.allclose(Sampling(1.0).distribution(logits), logits.softmax(-1))


def test_the_drafters_vocabulary_is_cut_or_padded_to_the_targets():
    model = tiny_model(vocab=41)
    for vocab, padded in ((37, 0), (41, 0), (50, 9)):
        logits = Runner(model, FullCache(model, 8), vocab).feed([1, 2], 2)
        assert logits.shape == (2, vocab)
        assert int(torch.isneginf(logits[0]).sum()) == padded
    assert torch.equal(
        Runner(model, FullCache(model, 8), 50).feed([44], 1), Runner(model, FullCache(model, 8), 50).feed([0], 1)
    )


# -- γ chosen online


@pytest.mark.parametrize("gamma", [None, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_of_a_warm_up_stays(gamma, temperature):
    texts = []
    for warm in (False, True):
        target = table(3)
        engine = Speculator(TableRunner(target), table_drafter(DRAFTERS["half"](target)), Sampling(temperature), 5)
        engine.prefill([1, 2])
        if warm:
            controller = warm_up(engine, gamma, 6)
            assert controller.max_gamma == (gamma or 6) and engine.ids == [1, 2]
            assert engine.target.length == engine.drafter.length == 1
        texts.append([step.tokens for step in engine.rounds(60, frozenset(), FixedGamma(3))])
    assert texts[0] == texts[1]


def test_auto_gamma_is_lossless():
    target = table(3)
    plain, _ = generate(target, None, Sampling(), 0, new=80, gamma=0)
    engine = Speculator(TableRunner(target), table_drafter(DRAFTERS["half"](target)), Sampling(), 0)
    engine.prefill([1, 2])
    steps = list(engine.rounds(80, frozenset(), AutoGamma(6, {0: 1e-4, 1: 1.2e-4, 6: 3e-4})))
    assert engine.new_tokens == plain.new_tokens and sum(s.drafted for s in steps) > 0
