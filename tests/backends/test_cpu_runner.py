"""Compiled steps and drafts against torch: odd shapes, fresh random inputs, every view, every kind of weight."""

from __future__ import annotations

import pytest
import torch

from bdcli.backends.select import pick_backend, torch_backend
from bdcli.base.errors import NonFiniteError
from bdcli.base.progress import SILENT
from bdcli.cache.selection import Full, Window
from bdcli.speculation.sampling import Sampling
from bdcli.speculation.speculator import Speculator
from tests.support.backends import SELECTIONS, drafter
from tests.support.cli import compiled_only
from tests.support.compiled import FRESH, KINDS, SHAPES, UNITS, entry, force
from tests.support.models import tiny_model
from tests.support.statistics import fits, law_of_two

pytestmark = compiled_only

# -- whole forwards


def runner(backend, model, selection, capacity):
    return drafter(backend, model, selection, capacity).runner


@pytest.mark.parametrize(("dtype", "units"), KINDS, ids=str)
@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"D{s['dim']}")
def test_forwards_equal_torchs(shape, kind, dtype, units, monkeypatch):
    """Rounds with drafts, rejections and a prompt that ends anywhere; bf16 is held to torch's own bf16 error."""
    force(monkeypatch, units)
    seed = int(torch.randint(10**6, (), generator=FRESH))
    exact = tiny_model(**shape, seed=seed, spread=0.15)
    model = tiny_model(**shape, seed=seed, spread=0.15, dtype=dtype)
    for prompt in (0, 3, 70, 131) if kind != "chunk" else (70, 131):
        ids = torch.randint(model.config.vocab_size, (prompt + 60,), generator=FRESH).tolist()
        plain, truth = (runner(torch_backend(), m, SELECTIONS[kind], prompt + 80) for m in (model, exact))
        fast = runner(pick_backend("compiled", [model], SILENT), model, SELECTIONS[kind], prompt + 80)
        runners, at, errors, floor = (plain, truth, fast), prompt, [], []
        for each in runners:
            each.prefill(ids[:prompt])
        for rows, back in ((1, 0), (2, 0), (9, 4), (1, 0), (9, 9), (8, 3), (3, 0), (9, 0), (9, 2), (2, 1)):
            got, want, ours = (each.feed(ids[at : at + rows], rows) for each in runners)
            errors.append((ours - want).square().mean())
            floor.append((got - want).square().mean())
            at += rows - back
            for each in runners:
                each.rollback(at)
        error = torch.stack(errors).mean().sqrt() / want.std()
        assert error < (1e-5 if dtype is torch.float32 else 1.2 * torch.stack(floor).mean().sqrt() / want.std())
        assert fast.cache.peak_entries == plain.cache.peak_entries


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("kind", SELECTIONS)
def test_a_row_is_the_same_alone_and_among_others(kind, units, monkeypatch):
    """Bit for bit in bf16, across block and chunk borders: verification writes what plain decoding writes."""
    force(monkeypatch, units)
    model = tiny_model(**SHAPES[0], seed=3, dtype=torch.bfloat16)
    engine, prompt = pick_backend("compiled", [model], SILENT), 505
    ids = torch.randint(41, (prompt + 40,), generator=FRESH).tolist()
    one, many = (runner(engine, model, SELECTIONS[kind], prompt + 60) for _ in range(2))
    for each in (one, many):
        each.prefill(ids[:prompt])
    for first, count in ((prompt, 10), (prompt + 10, 19), (prompt + 29, 3), (prompt + 32, 8)):
        alone = torch.cat([one.feed(ids[i : i + 1], 1) for i in range(first, first + count)])
        assert torch.equal(many.feed(ids[first : first + count], count), alone)


def test_long_feeds_are_read_in_parts_and_give_only_the_rows_asked_for():
    model = tiny_model(**SHAPES[0], seed=1)
    engine = pick_backend("compiled", [model], SILENT)
    ids = torch.randint(41, (150,), generator=FRESH).tolist()
    plain, fast = (runner(e, model, Full(), 160) for e in (torch_backend(), engine))
    for tokens, rows in ((ids[:75], 3), (ids[75:80], 5), (ids[80:150], 66)):
        got, want = fast.feed(tokens, rows), plain.feed(tokens, rows)
        assert (got - want).square().mean().sqrt() < 1e-4 * want.std()  # sums in another order; 9e-6 in 900 draws
        assert (got - want).abs().max() < 1e-3  # and no row is another row


@pytest.mark.parametrize("units", ["vectors", "dots", "tiles"])
def test_threads_change_nothing(units, monkeypatch):
    from bdcli.backends.cpu import pool

    force(monkeypatch, units)
    model = tiny_model(**SHAPES[2], seed=5, dtype=torch.bfloat16)
    ids = torch.randint(41, (700,), generator=FRESH).tolist()
    outputs = []
    for threads in (1, 2, 3):
        own = pool.Pool(threads)
        monkeypatch.setattr("bdcli.backends.cpu.runner.pool", lambda own=own: own)
        fast = runner(pick_backend("compiled", [model], SILENT), model, Full(), 720)
        fast.prefill(ids[:690])
        outputs.append(torch.cat([fast.feed(ids[690:697], 7), fast.feed(ids[697:698], 1)]))
        own.close()
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_saved_entries_come_back():
    model = tiny_model(**SHAPES[0], seed=2)
    fast = runner(pick_backend("compiled", [model], SILENT), model, Full(), 120)
    fast.prefill(list(range(40)))
    fast.feed([1, 2, 3, 4], 1)
    saved = fast.cache.save(37)
    keys, values = fast.cache.panel_keys.clone(), fast.cache.panel_values.clone()
    fast.rollback(38)
    fast.feed([7] * 6, 1)
    fast.cache.restore(saved)
    assert fast.length == 44
    assert torch.equal(fast.cache.panel_keys, keys) and torch.equal(fast.cache.panel_values, values)


# -- drafting


@pytest.mark.parametrize("kind", SELECTIONS)
def test_a_draft_is_what_torch_drafts(kind):
    model = tiny_model(**SHAPES[0], seed=4)
    ids = torch.randint(41, (140,), generator=FRESH).tolist()
    plain, fast = (
        drafter(e, model, SELECTIONS[kind], 200) for e in (torch_backend(), pick_backend("compiled", [model], SILENT))
    )
    greedy = Sampling()
    for each in (plain, fast):
        each.prefill(ids[:130])
    for length, gamma in ((131, 5), (133, 1), (134, 8), (140, 3)):
        drafts = [each.draft(ids[:length], gamma, greedy, FRESH).tokens for each in (plain, fast)]
        assert drafts[0] == drafts[1] and len(drafts[0]) == gamma
        for each in (plain, fast):
            each.rollback(length)


@pytest.mark.parametrize(
    "law", [(0.7, 0, 1.0), (1.0, 0, 0.8), (1.3, 5, 1.0), (1.0, 7, 0.6), (1.5, 0, 1.0, 0.1), (1.2, 9, 0.9, 0.2)], ids=str
)
def test_draws_follow_the_serving_distribution(law):
    """q is the law that torch computes from the same logits, and tokens are drawn from it."""
    sampling = Sampling(*law)
    model = tiny_model(**SHAPES[0], seed=6)
    plain, fast = (drafter(e, model, Full(), 60) for e in (torch_backend(), pick_backend("compiled", [model], SILENT)))
    for each in (plain, fast):
        each.prefill([1, 2, 3])
    wanted = sampling.distribution(plain.runner.feed([4], 1))[0]
    counts = torch.zeros(41)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4000):
        drafted, q = fast.draft([1, 2, 3, 4], 1, sampling, generator)
        fast.rollback(3)
        counts[drafted[0]] += 1
        assert q[0, drafted[0]] > 0
    assert torch.allclose(q[0], wanted, atol=1e-5)
    seen = wanted > 0
    assert counts[~seen].sum() == 0
    assert fits(counts[seen], wanted[seen])


def test_philox_equals_the_published_vectors():
    """Random123's known answers for Philox 4x32-10; the first two words make 53 bits."""
    for seed, counter, words in ((0, 0, (0x6627E8D5, 0xE169C58D)),):
        wanted = (((words[0] << 32) | words[1]) >> 11) * 2.0**-53
        assert entry("uniform")(seed, counter) == wanted


@pytest.mark.parametrize("sampling", [Sampling(0.5), Sampling(1.0, 0, 0.8)], ids=["t0.5", "top-p"])
def test_sampled_pairs_follow_the_targets_law(sampling):
    """20,000 draws through compiled target and drafter: the joint law of two tokens is the target's."""
    shape = SHAPES[0] | {"vocab": 5, "spread": 0.12}
    target, small = tiny_model(**shape, seed=1), tiny_model(**shape, seed=2)
    engine = pick_backend("compiled", [target, small], SILENT)
    prompt, plain = [1, 2, 3], runner(torch_backend(), target, Full(), 20)
    joint = law_of_two(sampling, plain, prompt, 5)
    run = Speculator(runner(engine, target, Full(), 20), drafter(engine, small, Full(), 20), sampling, 0)
    run.prefill(prompt)
    counts = torch.zeros(5, 5)
    for _ in range(20_000):
        while len(run.new_tokens) < 2:
            run.round(2)
        counts[tuple(run.new_tokens[:2])] += 1
        del run.ids[3:]
        run.target.rollback(2)
        run.drafter.rollback(2)
    seen = joint > 0
    assert counts[~seen].sum() == 0
    assert fits(counts[seen], joint[seen])


# -- what can go wrong


@pytest.mark.parametrize(("dtype", "units"), KINDS, ids=str)
def test_non_finite_weights_are_an_error_on_both_sides(dtype, units, monkeypatch):
    force(monkeypatch, units)
    model, broken = (tiny_model(**SHAPES[0], seed=0, dtype=dtype) for _ in range(2))
    broken.layers[1].down[3, 5] = torch.nan
    engine = pick_backend("compiled", [model], SILENT)
    for pair in ((broken, model), (model, broken)):
        run = Speculator(runner(engine, pair[0], Full(), 40), drafter(engine, pair[1], Full(), 40), Sampling(), 0)
        run.prefill([1, 2, 3])
        with pytest.raises(NonFiniteError, match="target" if pair[0] is broken else "drafter"):
            run.round(2)


def test_a_cache_refuses_what_it_has_no_room_for():
    model = tiny_model(**SHAPES[0], seed=0)
    engine = pick_backend("compiled", [model], SILENT)
    full = runner(engine, model, Full(), 32)
    full.prefill(list(range(30)))
    with pytest.raises(RuntimeError, match="cannot hold"):
        full.feed([1, 2, 3], 1)
    ring = runner(engine, model, Window(40, gamma=4), 120)
    ring.prefill([1] * 90)
    ring.feed([1] * 6, 1)
    ring.rollback(80)
    with pytest.raises(RuntimeError, match="rolled back further"):
        ring.feed([1], 1)
