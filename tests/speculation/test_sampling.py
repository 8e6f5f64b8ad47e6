"""The serving distribution: extreme settings, min-p and the repetition penalty, exact for target and drafter."""

import itertools

import pytest
import torch

from bdcli.backends.cuda.program import SamplingTensors
from bdcli.backends.select import pick_backend, static_backend, torch_backend
from bdcli.base.progress import SILENT
from bdcli.cache.selection import CacheSize, Full
from bdcli.speculation.baseline import teacher_force
from bdcli.speculation.draft_length import FixedGamma
from bdcli.speculation.sampling import Sampling, SeenTokens
from bdcli.speculation.speculator import Speculator
from tests.support.backends import drafter
from tests.support.cli import compiled_only
from tests.support.compiled import SHAPES
from tests.support.models import tiny_model
from tests.support.statistics import p_value

GREEDY_LIKE = [
    *(Sampling(10.0**-e) for e in (3, 10, 30, 37, 38, 39, 45, 46, 300)),
    *(Sampling(1.0, 0, 10.0**-e) for e in (4, 20, 38, 45, 46, 300)),
    Sampling(1.0, 1),
    Sampling(1e-46, 10**6, 1e-46, 1.0),
    Sampling(1.0, min_p=1.0),
]
FLAT = [Sampling(1e300), Sampling(3e38, 10**6, 1.0, 1e-300), Sampling(1e38, min_p=1e-46)]


def logits_like(rows, vocab=41):
    return 9 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(5))


def on_device(sampling, logits):
    return SamplingTensors.of(sampling, logits.shape[-1], logits.device).distribution(logits)


@pytest.mark.parametrize("serve", [Sampling.distribution, on_device], ids=["torch", "program"])
def test_extreme_settings_are_greedy_or_uniform_and_never_nan(serve):
    logits = logits_like(6)
    logits[:, 30:] = -torch.inf  # a drafter of fewer tokens
    for sampling in GREEDY_LIKE:
        p = serve(sampling, logits)
        assert torch.equal(p.argmax(-1), logits.argmax(-1)) and bool((p.amax(-1) > 0.999).all()), sampling
    for sampling in FLAT:
        assert torch.allclose(serve(sampling, logits)[:, :30], torch.tensor(1 / 30), atol=1e-6), sampling


@compiled_only
def test_compiled_draws_are_greedy_or_uniform_under_extreme_settings():
    model = tiny_model(**SHAPES[0], seed=6)
    fast = drafter(pick_backend("compiled", [model], SILENT), model, Full(), 60)
    fast.prefill([1, 2, 3])
    generator = torch.Generator().manual_seed(0)
    best = fast.draft([1, 2, 3, 4], 5, Sampling(), generator).tokens
    for sampling in GREEDY_LIKE:
        fast.rollback(3)
        tokens, q = fast.draft([1, 2, 3, 4], 5, sampling, generator)
        assert tokens == best and bool((q.amax(-1) > 0.98).all()), sampling
    for sampling in FLAT:
        fast.rollback(3)
        assert torch.allclose(fast.draft([1, 2, 3, 4], 2, sampling, generator).q, torch.tensor(1 / 41), atol=1e-5)


@pytest.mark.parametrize("serve", [Sampling.distribution, on_device], ids=["torch", "program"])
def test_min_p_after_the_others_is_that_of_transformers(serve):
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = logits_like(40) / 4
    for k, p, m in itertools.product((0, 11), (1.0, 0.8), (0.02, 0.3, 0.9)):
        want = TemperatureLogitsWarper(0.7)(None, logits)
        want = TopKLogitsWarper(k)(None, want) if k else want
        want = TopPLogitsWarper(p)(None, want) if p < 1 else want
        want = MinPLogitsWarper(m)(None, want).softmax(-1)
        assert torch.allclose(serve(Sampling(0.7, k, p, m), logits), want, atol=1e-6)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_each_row_is_penalised_for_its_own_text_as_transformers_would(penalty):
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, text, draft = logits_like(4), [3, 5, 3, 9], [7, 5, 12]
    logits[:, 35:] = -torch.inf
    seen, judge = SeenTokens(41, "cpu"), RepetitionPenaltyLogitsProcessor(penalty)
    for ids in (text[:2], text, [*text, 20, 21], text):  # growing, and another text
        got = seen.penalised(logits, penalty, ids, draft)
        for row in range(4):
            want = judge(torch.tensor([ids + draft[:row]]), logits[row : row + 1])
            assert torch.equal(got[row], want[0])
        alone = seen.penalised(logits[3:], penalty, ids, draft)
        assert torch.equal(alone[0], got[3])


def engines(*models):
    found = {"torch": torch_backend(), "program": static_backend("triton", "plain operations")}
    return found | {"compiled": pick_backend("compiled", list(models), SILENT)}


@pytest.mark.parametrize("engine", ["torch", "program", pytest.param("compiled", marks=compiled_only)])
def test_greedy_text_with_a_penalty_is_that_of_plain_steps(engine):
    """Drafts of any length give what one penalised argmax after another does."""
    shape = SHAPES[0] | {"spread": 0.12}
    target, small = tiny_model(**shape, seed=1), tiny_model(**shape, seed=1)
    small.head = small.head + 0.01
    backend, prompt, size = engines(target, small)[engine], [1, 2, 3, 2], CacheSize(3, 60, 60)
    sampling, plain = Sampling(repetition_penalty=1.3), torch_backend().target(target, size)
    text, seen = list(prompt), SeenTokens(41, "cpu")
    plain.prefill(prompt[:-1])
    while len(text) < 34:
        text += seen.penalised(plain.feed(text[plain.length :], 1), 1.3, text).argmax(-1).tolist()
    for gamma in (0, 1, 4):
        run = Speculator(backend.target(target, size), backend.drafter(small, Full(), size, 41), sampling, 0)
        run.prefill(prompt)
        steps = list(run.rounds(30, frozenset(), FixedGamma(gamma)))
        assert run.ids == text
        judge = backend.target(target, size)
        judge.prefill(prompt[:-1])
        assert teacher_force(judge, prompt, run.new_tokens, 1.3).equal
        assert not teacher_force(judge, prompt, run.new_tokens).equal
        assert gamma == 0 or sum(s.accepted for s in steps) > 0.5 * sum(s.drafted for s in steps) > 0


def joint_law(sampling, plain, prompt, vocab):
    """Joint law [V, V] of the two tokens after `prompt`, each from the logits penalised for the text before it."""

    def law(text):
        plain.rollback(len(text) - 1)
        logits = plain.feed(text[plain.length :], 1)
        return sampling.distribution(SeenTokens(vocab, "cpu").penalised(logits, sampling.repetition_penalty, text))[0]

    plain.prefill(prompt[:-1])
    first = law(prompt)
    return torch.stack([first[token] * law([*prompt, token]) for token in range(vocab)])


@pytest.mark.parametrize("engine", ["torch", "program", pytest.param("compiled", marks=compiled_only)])
@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, min_p=0.3), Sampling(0.9, 4, 0.9, 0.1, 1.5)], ids=["min-p", "penalty"]
)
def test_sampled_pairs_follow_the_targets_law(sampling, engine):
    """1,500 draws: the joint law of two tokens is that of the target's own penalised and cut logits."""
    shape = SHAPES[0] | {"vocab": 5, "spread": 0.12, "layers": 1}
    target, small = tiny_model(**shape, seed=1), tiny_model(**shape, seed=2)
    backend, prompt, size = engines(target, small)[engine], [1, 2, 1], CacheSize(2, 20, 20)
    joint = joint_law(sampling, torch_backend().target(target, size), prompt, 5)
    run = Speculator(backend.target(target, size), backend.drafter(small, Full(), size, 5), sampling, 3)
    run.prefill(prompt)
    counts, accepted = torch.zeros(5, 5), 0
    for _ in range(1500):
        while len(run.new_tokens) < 2:
            accepted += run.round(2).accepted
        counts[tuple(run.new_tokens[:2])] += 1
        del run.ids[3:]
        run.target.rollback(2)
        run.drafter.rollback(2)
    possible = joint > 0
    assert accepted > 100 and counts[~possible].sum() == 0
    assert p_value(counts[possible], joint[possible]) > 1e-4
    flat = torch.full_like(joint[possible], 1 / int(possible.sum()))
    assert p_value(counts[possible], flat) < 1e-6, "the test could not tell one law from another"
