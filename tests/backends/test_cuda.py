"""The GPU engine's program on a CPU, plain operations standing in for kernels: the same text and law as torch's engine.

What a program may not do because a CUDA graph could not hold it is forbidden here as well: looking at a value, or
making a tensor whose size depends on one.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bdcli.backends.cuda import caches
from bdcli.backends.cuda import program as program_module
from bdcli.backends.cuda.ops import ops_for
from bdcli.backends.cuda.program import SamplingTensors
from bdcli.backends.select import pick_backend, static_backend, torch_backend
from bdcli.base.errors import NonFiniteError, UserError
from bdcli.base.progress import SILENT
from bdcli.cache.selection import CacheSize, Full, Window
from bdcli.cache.view import View
from bdcli.decode.memory import decode_plan
from bdcli.speculation.baseline import teacher_force
from bdcli.speculation.draft_length import FixedGamma
from bdcli.speculation.sampling import Sampling
from bdcli.speculation.speculator import Speculator
from tests.support.backends import SELECTIONS as PLAIN_SELECTIONS
from tests.support.backends import GivenView, drafter
from tests.support.models import tiny_model
from tests.support.statistics import fits, law_of_two

GREEDY = Sampling()
STATIC = static_backend("triton", "plain operations")
FRESH = torch.Generator()
FRESH.seed()
EXACT = torch.float64  # where texts of two engines are compared: in fp32 one token in a million is a tie
SELECTIONS = PLAIN_SELECTIONS | {
    "chunk absolute": GivenView(View(60, 4, 16, 9, False)),
    "one key": Window(4 + 6 + 2, gamma=6),
}
SHAPES = [
    {},
    {"heads": 6, "kv_heads": 1, "biases": True, "qk_norm": True, "layers": 3},
    {"heads": 3, "kv_heads": 3, "layers": 1},
]


def random_ids(count, vocab=41):
    return torch.randint(vocab, (count,), generator=FRESH).tolist()


def speculator(backend, target, drafter, selection, prompt, new, sampling=GREEDY, seed=0):
    size = CacheSize(len(prompt) - 1, len(prompt) + new + 12, len(prompt) + new + 12)
    drafting = drafter and backend.drafter(drafter, selection, size, target.config.vocab_size)
    run = Speculator(backend.target(target, size), drafting, sampling, seed, target.device)
    run.prefill(prompt)
    return run


def write(backend, target, drafter, selection, prompt, new, gammas=(4,), eos=frozenset(), sampling=GREEDY, seed=0):
    """(text, [(drafted, accepted)], finish reason, entries) with γ taken from `gammas` in turn."""

    class Turns(FixedGamma):
        def choose(self):
            self.turn = getattr(self, "turn", -1) + 1
            return gammas[self.turn % len(gammas)]

    run = speculator(backend, target, drafter, selection, prompt, new, sampling, seed)
    steps = list(run.rounds(new, eos, Turns(0)))
    entries = run.drafter.peak_entries if drafter else None
    return run.new_tokens, [(s.drafted, s.accepted) for s in steps], run.finish_reason, entries


def similar(noise=0.05, seed=None, **shape):
    """(target, drafter) that often agree: the same weights but for noise on the head, attention not too strong."""
    seed = int(torch.randint(10**6, (), generator=FRESH)) if seed is None else seed
    target, drafter = tiny_model(**shape, seed=seed), tiny_model(**shape, seed=seed)
    for layer in target.layers + drafter.layers:
        layer.out *= 0.5
    drafter.head = target.head + noise * torch.randn(target.head.shape, generator=FRESH)
    return target, drafter


@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=["gqa", "biases", "mha"])
def test_greedy_text_and_rounds_equal_torchs(shape, kind):
    """Also the entries counted, with rounds that draft nothing in between, so that the drafter lags and catches up."""
    target, drafter = similar(**shape, dtype=EXACT)
    gammas = (4, 6, 1, 0, 0, 0, 0, 0, 5) if kind == "one key" else (4, 9, 1, *[0] * 8, 2, 7)
    agreed = 0
    for length in (90, 131) if "chunk" in kind else (1, 2, 3, 70, 131):
        prompt = random_ids(length)
        got, want = (write(e, target, drafter, SELECTIONS[kind], prompt, 60, gammas) for e in (STATIC, torch_backend()))
        assert got == want
        agreed += sum(accepted for _, accepted in got[1])
    assert agreed > 1, "a drafter that never agrees would prove little"


def test_text_stops_at_eos_inside_a_block_and_at_the_length():
    (target, drafter), prompt = similar(0.02, dtype=EXACT), random_ids(50)
    text, rounds, reason, _ = write(STATIC, target, drafter, Full(), prompt, 37, (6,))
    assert reason == "length" and len(text) == 37 and rounds[-1][0] <= 6
    for at in (0, 5, 20):
        end = text.index(text[at])
        for engine in (STATIC, torch_backend()):
            got = write(engine, target, drafter, Full(), prompt, 37, (6,), frozenset(text[at : at + 1]))
            assert got[0] == text[: end + 1] and got[2] == "stop"
    assert write(STATIC, target, None, Full(), prompt, 37, (0,))[0] == text, "plain decoding"
    assert len(write(STATIC, target, drafter, Full(), prompt, 1)[0]) == 1


@pytest.mark.parametrize("vocab", [29, 64])
def test_a_drafter_with_another_padding_of_the_vocabulary(vocab):
    target, drafter = tiny_model(seed=5, dtype=EXACT), tiny_model(seed=6, vocab=vocab, dtype=EXACT)
    prompt = random_ids(60)
    got, want = (write(e, target, drafter, SELECTIONS["window"], prompt, 40) for e in (STATIC, torch_backend()))
    assert got == want


def test_measuring_in_between_changes_nothing():
    """The baseline walks the target back over a round; also when sampling, whose random numbers must not be spent."""
    (target, drafter), prompt = similar(), random_ids(40)
    for sampling in (Sampling(), Sampling(0.8)):
        texts = []
        for measured in (False, True):
            run = speculator(STATIC, target, drafter, SELECTIONS["window"], prompt, 60, sampling)
            while len(run.new_tokens) < 40:
                first, step = len(run.ids), run.round(4)
                kept = step.logits.clone()
                if measured:
                    saved = run.target.cache.save(first - 1)
                    run.target.cache.length = first - 1
                    for i in range(len(step.tokens)):
                        logits, seconds = run.one_row(run.ids[first - 1 + i : first + i])
                        torch.testing.assert_close(logits[0], kept[i], rtol=1e-4, atol=1e-4)
                        assert seconds > 0
                    run.target.cache.restore(saved)
                    assert all(run.rehearse(gamma) > 0 for gamma in (2, 0, 4))
            texts.append(run.new_tokens)
        assert texts[0] == texts[1]


def test_feeds_of_any_length_equal_torchs():
    target = tiny_model(seed=9)
    for selection in (Full(), SELECTIONS["window"]):
        plain, ours = (drafter(e, target, selection, 400).runner for e in (torch_backend(), STATIC))
        ids = random_ids(300)
        for each in (plain, ours):
            each.prefill(ids[:50])
        for start, stop, rows in ((50, 51, 1), (51, 60, 9), (60, 62, 1), (62, 201, 3), (201, 202, 1)):
            got, want = (each.feed(ids[start:stop], rows) for each in (ours, plain))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        with pytest.raises(RuntimeError, match=r"cannot hold|exceed"):
            ours.catch_up(random_ids(300))


def test_texts_read_together_are_read_as_alone():
    """What writes training texts feeds several readers of one model at a time."""
    target = tiny_model(seed=10)
    for selection in (Full(), SELECTIONS["window"]):
        ids = [random_ids(80), random_ids(95)]
        made = [[drafter(e, target, selection, 120).runner for _ in ids] for e in (STATIC, torch_backend())]
        logits = []
        for pair in made:
            for reader, text in zip(pair, ids):
                reader.prefill(text[:70])
            logits.append(type(pair[0]).feed_together(pair, [text[70:73] for text in ids], [3, 1]))
            logits[-1] = [x.clone() for x in logits[-1]] + [r.feed(t[73:75], 1).clone() for r, t in zip(pair, ids)]
        for got, want in zip(*logits):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# -- sampling


@pytest.mark.parametrize(
    "law", [(0.7, 0, 1.0), (1.0, 0, 0.8), (1.3, 5, 1.0), (1.0, 7, 0.6), (1.0, 99, 0.9), (1.0, 7, 0.9, 0.3)], ids=str
)
def test_the_law_on_the_device_is_that_of_sampling(law):
    logits = 3 * torch.randn(6, 41, generator=FRESH)
    logits[:, 30:] = -torch.inf
    sampling = Sampling(*law)
    got = SamplingTensors.of(sampling, 41, torch.device("cpu")).distribution(logits)
    torch.testing.assert_close(got, sampling.distribution(logits))


@pytest.mark.parametrize("sampling", [Sampling(0.5), Sampling(1.0, 4, 0.9)], ids=["t", "k and p"])
def test_sampled_pairs_follow_the_targets_law(sampling):
    """2,500 draws: the joint law of the first two tokens is the target's, from its own plain logits."""
    target, drafter = (tiny_model(vocab=5, layers=1, seed=seed) for seed in (1, 2))
    prompt = [1, 2, 3]
    plain = torch_backend().target(target, CacheSize(0, 20, 20))
    joint = law_of_two(sampling, plain, prompt, 5)
    run = speculator(STATIC, target, drafter, Full(), prompt, 8, sampling)
    counts, accepted = torch.zeros(5, 5), 0
    for _ in range(2500):
        while len(run.new_tokens) < 2:
            accepted += run.round(2).accepted
        counts[tuple(run.new_tokens[:2])] += 1
        del run.ids[3:]
        run.target.rollback(2)
        run.drafter.rollback(2)
    seen = joint > 0
    assert accepted > 200 and counts[~seen].sum() == 0
    assert fits(counts[seen], joint[seen])


def test_a_seed_repeats_sampled_text():
    (target, drafter), prompt = similar(), random_ids(30)
    texts = [write(STATIC, target, drafter, Full(), prompt, 50, sampling=Sampling(1.0), seed=s)[0] for s in (4, 4, 5)]
    assert texts[0] == texts[1] != texts[2]


# -- what a graph can hold


class NoLooking(TorchDispatchMode):
    """Fails on operations that hand a value to the host or bring one from it, or whose output's size depends on one.

    In `where` torch copies a Python number to the device; plain twins of kernels, which run on no device, may do so.
    """

    forbidden = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "item",
        "is_nonzero",
        "equal",
        "bincount",
        "repeat_interleave",
        "lift_fresh",
        "scalar_tensor",
    )

    def __init__(self):
        super().__init__()
        self.shapes, self.standing_in = [], False

    def stand_in(self, function):
        def run(*args, **kwargs):
            self.standing_in = True
            try:
                return function(*args, **kwargs)
            finally:
                self.standing_in = False

        return run

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert not any(word in name for word in self.forbidden), f"{name} in a round"
        if name == "index":  # a boolean index is a nonzero
            assert all(i is None or i.dtype is not torch.bool for i in args[1])
        if name == "where" and not self.standing_in:
            assert all(t.dim() > 0 for t in args), "a Python number for where in a round"
        out = function(*args, **(kwargs or {}))
        self.shapes += [
            (name, tuple(t.shape))
            for t in (out if isinstance(out, (tuple, list)) else [out])
            if isinstance(t, torch.Tensor)
        ]
        return out


class NoReading(TorchFunctionMode):
    """The same for what never reaches the dispatcher on a CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        assert name not in ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__array__"), (
            f"{name} in a round"
        )
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), Sampling(0.9, 5, 0.9)], ids=["greedy", "t", "trunc"])
@pytest.mark.parametrize("kind", ["full", "official", "window", "chunk absolute"])
def test_a_round_looks_at_nothing_and_makes_the_same_tensors_whatever_the_text(kind, sampling, monkeypatch):
    """So one graph serves every round: no value decides what is run or how large anything is."""
    mode, plain = NoLooking(), ops_for("cpu")
    ops = type(plain)(**{name: mode.stand_in(getattr(plain, name)) for name in plain.__dataclass_fields__})
    for module in (program_module, caches):
        monkeypatch.setattr(module, "ops_for", lambda _device: ops)
    (target, drafter), prompt = similar(), random_ids(100)
    run = speculator(STATIC, target, drafter, SELECTIONS[kind], prompt, 300, sampling)
    run.round(4)
    program, _ = run._whole._rounds[4]
    traces, accepted, places = [], set(), [t.data_ptr() for t in (program.result, program.logits, program.uniform)]
    while len(traces) < 6 or (len(accepted) == 1 and len(traces) < 50):
        mode.shapes = []
        with NoReading(), mode:
            program()
        traces.append(mode.shapes)
        accepted.add(int(program.result[-2]))
        run._whole._device_text = None  # what the device did behind the host's back
        run.round(4)
    assert all(trace == traces[0] for trace in traces) and len(traces[0]) > 100
    assert len(accepted) > 1, "rounds that all went the same way prove little"
    assert places == [t.data_ptr() for t in (program.result, program.logits, program.uniform)]


def test_the_watchman_catches_a_look():
    for look in (
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x.where(x > 0, 0),
        lambda _x: torch.tensor([1]),
    ):
        with pytest.raises(AssertionError, match=r"in a round|assert"), NoReading(), NoLooking():
            look(torch.randn(5))


# -- on a device

on_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
WIDE = {"dim": 64, "hidden": 128, "inner": 192, "heads": 4, "kv_heads": 2}


def moved(model, dtype):
    """A copy of the model on the GPU."""
    for owner in (model, *model.layers):
        for name in owner.__slots__:
            value = getattr(owner, name)
            if isinstance(value, torch.Tensor):
                setattr(owner, name, value.to("cuda", dtype))
    return model


@pytest.mark.gpu
@on_device
@pytest.mark.parametrize("kind", SELECTIONS)
def test_graphs_write_what_torch_writes_in_fp32(kind):
    pair = [moved(m, torch.float32) for m in similar(**WIDE)]
    for length in (90, 1000) if "chunk" in kind else (1, 70, 1000):
        prompt = random_ids(length)
        got, want = (
            write(e, *pair, SELECTIONS[kind], prompt, 80, (4, 6, 1, 0, 0, 0, 5)) for e in (STATIC, torch_backend())
        )
        assert got == want


@pytest.mark.gpu
@on_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["full", "official", "window", "window absolute", "chunk"])
def test_graphs_write_what_plain_decoding_writes_in_low_precision(kind, dtype):
    """By the tie rule; and feeds are as near to fp32 as torch's own."""
    target, drafter = similar(**WIDE)
    pair, prompt = [moved(m, dtype) for m in (target, drafter)], random_ids(500)
    text, rounds, _, _ = write(STATIC, *pair, SELECTIONS[kind], prompt, 80)
    assert sum(accepted for _, accepted in rounds) > 1
    judge = torch_backend().target(pair[0], CacheSize(0, 600, 600))
    judge.prefill(prompt[:-1])
    assert teacher_force(judge, prompt, text).equal


@pytest.mark.gpu
@on_device
@pytest.mark.parametrize("sampling", [Sampling(0.8), Sampling(1.0, 7, 0.9)], ids=["t", "k and p"])
def test_graphs_sample_by_the_law(sampling):
    """First tokens of 3,000 short texts, and a seed that repeats."""
    target, drafter = (moved(m, torch.float32) for m in similar(**WIDE, noise=0.5))
    run = speculator(STATIC, target, drafter, Full(), [1, 2, 3], 8, sampling)
    plain = torch_backend().target(target, CacheSize(0, 20, 20))
    plain.prefill([1, 2])
    law, counts = sampling.distribution(plain.feed([3], 1))[0].cpu(), torch.zeros(41)
    for _ in range(3000):
        run.round(2)
        counts[run.new_tokens[0]] += 1
        del run.ids[3:]
        run.target.rollback(2)
        run.drafter.rollback(2)
    assert counts[law == 0].sum() == 0 and fits(counts[law > 0], law[law > 0])
    texts = [write(STATIC, target, drafter, Full(), [1, 2, 3], 40, sampling=sampling, seed=s)[0] for s in (4, 4, 5)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.gpu
@on_device
def test_a_graph_is_made_once_and_its_times_add_up():
    pair = [moved(m, torch.bfloat16) for m in similar(**WIDE)]
    run = speculator(STATIC, *pair, SELECTIONS["window"], random_ids(300), 200)
    steps = [run.round(4) for _ in range(20)]
    assert len(run._whole._rounds) == 1
    for step in steps:
        assert 0 < step.draft_s < step.device_s < step.seconds


@pytest.mark.gpu
@on_device
def test_a_device_holds_what_was_planned():
    shape = WIDE | {"layers": 4, "hidden": 512, "inner": 1024, "heads": 8, "kv_heads": 8}
    target, drafter = (moved(tiny_model(**shape), torch.bfloat16) for _ in range(2))
    prompt, selection = 8000, Window(52, gamma=9)
    size = CacheSize(prompt - 1, 8100, 8100)
    plan = decode_plan(target.config, drafter.config, 2, size, selection)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    drafting = STATIC.drafter(drafter, selection, size, target.config.vocab_size)
    run = Speculator(STATIC.target(target, size), drafting, GREEDY, 0, "cuda")
    run.prefill(random_ids(prompt))
    run.round(8)
    grown = torch.cuda.max_memory_allocated() - before
    assert 0.6 * (plan.peak - plan.weights) < grown < 1.1 * (plan.peak - plan.weights) + 64 * 2**20  # and workspaces


# -- what can go wrong


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, 0, 0.9)], ids=["greedy", "t", "p"])
def test_non_finite_weights_are_an_error_on_both_sides(sampling):
    model, broken = tiny_model(seed=0), tiny_model(seed=0)
    broken.layers[1].down[3, 5] = torch.nan
    for pair in ((broken, model), (model, broken)):
        run = speculator(STATIC, *pair, Full(), [1, 2, 3], 20, sampling)
        with pytest.raises(NonFiniteError, match="target" if pair[0] is broken else "drafter"):
            run.round(2)
        assert run.ids == [1, 2, 3]


def test_a_draft_longer_than_the_cache_was_planned_for_is_refused():
    model = tiny_model(seed=0)
    run = speculator(STATIC, model, model, Window(40, gamma=4), [1] * 90, 20)
    with pytest.raises(RuntimeError, match="draft of 5 tokens"):
        run.round(5)
    with pytest.raises(RuntimeError, match="cannot hold"):
        speculator(STATIC, model, None, Full(), [1] * 8, 2).target.feed([1] * 20, 1)


def test_triton_is_refused_where_there_is_no_gpu():
    with pytest.raises(UserError, match="--engine triton cannot run here \\(cpu device\\)"):
        pick_backend("triton", [tiny_model()], SILENT)
