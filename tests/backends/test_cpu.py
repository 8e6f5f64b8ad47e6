"""Compiled steps against torch and plain maths: odd shapes, fresh random inputs, every view, every kind of weight."""

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from bdcli.backends.cpu import support
from bdcli.backends.select import pick_backend, torch_backend
from bdcli.base.errors import NonFiniteError, UserError
from bdcli.cache.budget import BudgetCache
from bdcli.cache.full import FullCache
from bdcli.cache.official import OfficialCache
from bdcli.cache.view import View, plan_view
from bdcli.speculation.sampling import Sampling
from bdcli.speculation.speculator import Speculator
from tests.support.cli import compiled_only
from tests.support.models import tiny_model
from tests.support.statistics import fits, law_of_two

pytestmark = compiled_only
UNITS = {"vectors": 0, "dots": 0, "tiles": 63, "tiles in attention": 32, "some tiles": 21}  # BY_TILES bits
KINDS = [(torch.float32, "vectors"), *((torch.bfloat16, units) for units in ("vectors", "dots", "tiles"))]
FRESH = torch.Generator()
FRESH.seed()


def randn(*shape):
    return torch.randn(*shape, generator=FRESH)


def entry(name):
    from bdcli.backends.cpu import reader, simd  # noqa: F401

    return simd.entries[name].ctypes


def force(monkeypatch, units):
    """These units of the processor multiply bf16, whatever is faster here."""
    from bdcli.backends.cpu import amx
    from bdcli.backends.cpu.simd import HAS_DOTS

    if UNITS[units] and not amx.available():
        pytest.skip("no matrix tiles here")
    if units == "dots" and not HAS_DOTS:
        pytest.skip("no dot product of bf16 here")
    monkeypatch.setattr("bdcli.backends.cpu.runner.tiled", lambda *_: UNITS[units])
    monkeypatch.setattr("bdcli.backends.cpu.runner.dots_pay", lambda: units == "dots")


# -- the two products


def kind_for(w, x):
    """Rows of bf16 are for dot products."""
    from bdcli.backends.cpu.products import DOTS, FLOATS, PAIRS

    return FLOATS if w.dtype is torch.float32 else DOTS if x.dtype is torch.bfloat16 else PAIRS


def rows_dot(w, x):
    packed = x if x.dtype is w.dtype else x.view(len(x), -1, 16, 2).transpose(2, 3).contiguous()
    y, size, width = torch.full((len(x), len(w)), torch.nan), w.element_size(), w.shape[1]
    shape = (len(w) << 32) | (width * size // 64)
    places = w.data_ptr(), width * size, packed.data_ptr(), x[0].nbytes, y.data_ptr(), 4 * len(w)
    entry("rows_dot")(len(x), kind_for(w, x), *places, shape)
    return y


def scores(keys, x):
    """x [R, D] against keys [S, D] through key panels."""
    from bdcli.backends.cpu.caches import key_panels

    panels, y = key_panels(keys).contiguous(), torch.zeros(len(x), len(keys))
    pair, dim = 2 if keys.dtype is torch.bfloat16 else 1, keys.shape[1]
    shape = (len(keys) // 16 << 32) | (dim // pair)
    places = panels.data_ptr(), 64, panels[0].nbytes, x.data_ptr(), x[0].nbytes, y.data_ptr(), 4 * len(keys)
    entry("panels")(len(x), kind_for(keys, x), *places, shape, 0)
    return y


def tile_rows(w, x):
    """Packed by hand: for each 32 numbers 16 pairs of high parts of all rows, then of low ones."""
    from bdcli.backends.cpu.amx import tile_configs

    columns, width = w.shape
    high = x.bfloat16()
    parts = torch.stack((high, (x - high.float()).bfloat16()))
    packed = torch.zeros(width // 32, 2, 16, 16, 2, dtype=torch.bfloat16)
    packed[:, :, :, : len(x)] = parts.view(2, len(x), width // 32, 16, 2).permute(2, 0, 3, 1, 4)
    y, corner, config = torch.full((len(x), columns), torch.nan), torch.zeros(1024), tile_configs()
    room = -(-corner.data_ptr() // 64) * 64
    entry("shape_tiles")(config.ctypes.data + 64 * (len(x) - 1))
    places = w.data_ptr(), 2 * width, packed.data_ptr(), y.data_ptr(), 4 * columns, columns, width // 32, room
    entry("tile_rows")(len(x), len(x) == 1, *places)
    entry("end_tiles")()
    return y


def tile_scores(keys, x):
    from bdcli.backends.cpu.amx import tile_configs
    from bdcli.backends.cpu.caches import key_panels

    panels, dim, config = key_panels(keys).contiguous(), keys.shape[1], tile_configs()
    high, y = x.bfloat16(), torch.zeros(16, len(keys))
    split = torch.zeros(16, 2, dim, dtype=torch.bfloat16)
    split[: len(x)] = torch.stack((high, (x - high.float()).bfloat16()), 1)
    shape = (len(keys) // 16 << 32) | (dim // 32)
    places = panels.data_ptr(), 64, 1024, 32 * dim, y.data_ptr(), 4 * len(keys)
    entry("shape_tiles")(config.ctypes.data + 64 * (15 + len(x)))
    entry("tile_panels")(split.data_ptr(), 4 * dim, 2 * dim, *places, shape)
    entry("end_tiles")()
    return y[: len(x)]


def test_tiles_equal_plain_maths_whatever_the_rows(monkeypatch):
    force(monkeypatch, "tiles")
    for product, columns, width in (
        (tile_rows, 37, 32),
        (tile_rows, 80, 704),
        (tile_scores, 48, 96),
        (tile_scores, 16, 32),
    ):
        w, x = randn(columns, width).bfloat16(), randn(16, width)
        wanted = x.double() @ w.double().T
        together = product(w, x)
        assert (together - wanted).abs().max() < 1e-5 * wanted.abs().max() * math.sqrt(width)
        for rows in range(1, 16):
            assert torch.equal(product(w, x[:rows].contiguous()), together[:rows])


def test_products_are_chosen_once_by_whole_steps_and_kept(monkeypatch, tmp_path):
    from bdcli.backends.cpu import amx
    from bdcli.backends.cpu import autotune as choice
    from bdcli.backends.cpu import tables as layout

    if not amx.available():
        pytest.skip("no matrix tiles here")
    monkeypatch.setattr(choice, "code_folder", lambda: tmp_path)
    monkeypatch.setattr(choice, "_known", {})
    ids, texts = torch.randint(41, (70,), generator=FRESH).tolist(), []
    for times in (None, dict(zip(choice.CHOICES, ([1, 9], [1.02, 5], [1.01, 6], [1.1, 2])))):
        if times:  # as another process finds it
            (shape,) = choice._known
            entry = {"tries": 1, "ms": {name: [[t, t] for t in each] for name, each in times.items()}}
            (tmp_path / choice.FILE).write_text(json.dumps({shape: entry}))
            monkeypatch.setattr(choice, "_known", {})
        model = tiny_model(**SHAPES[0], seed=8, spread=0.15, dtype=torch.bfloat16)
        fast, plain = (reader(e, model, None, 90) for e in (pick_backend("compiled", [model], print), torch_backend()))
        for each in (fast, plain):
            each.prefill(ids)
        texts.append(fast.feed([1, 2, 3], 3))
        assert fast.length == 73 and fast.cache.peak_entries == 73  # measuring left no trace
        assert (texts[-1] - plain.feed([1, 2, 3], 3)).abs().max() < 0.1 * texts[-1].std()
        (kept,) = json.loads((tmp_path / choice.FILE).read_text()).values()
        assert kept["tries"] == 1 and kept["ms"].keys() == choice.CHOICES.keys()
        assert all(len(each) == 2 and min(t) > 0 for each in kept["ms"].values() for t in each)
        assert fast._table[layout.TILED] in choice.CHOICES.values()
    assert fast._table[layout.TILED] == choice.CHOICES["tiles in attention"]


def test_a_busy_moment_does_not_choose_products_for_good(monkeypatch, tmp_path):
    from types import SimpleNamespace

    from bdcli.backends.cpu import autotune as choice

    now, busy, ran = [0.0], [True], []
    monkeypatch.setattr(choice, "code_folder", lambda: tmp_path)
    monkeypatch.setattr(choice, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def step(bits: int, rows: int) -> None:
        ran.append(bits)
        honest = rows * (2.0 if bits == choice.CHOICES["vectors"] else 3.0)
        now[0] += honest * (1.3 ** len(ran) if busy[0] else 1.0)  # every step slower than the one before

    chosen, counts = [], []
    for busy[0] in (True, False, False):  # three processes
        monkeypatch.setattr(choice, "_known", {})
        ran.clear()
        chosen.append(choice.tiled("shape", (1, 9), step))
        counts.append(len(ran))
    assert counts == [choice.TRIALS * len(choice.CHOICES) * 2] * 2 + [0]
    assert chosen[1] == chosen[2] == choice.CHOICES["vectors"]
    busy[0] = True
    for _ in range(choice.TRIES + 2):  # always busy: measured no more than so often
        monkeypatch.setattr(choice, "_known", {})
        choice.tiled("another", (1, 9), step)
    assert json.loads((tmp_path / choice.FILE).read_text())["another"]["tries"] == choice.TRIES


@pytest.mark.parametrize(("dtype", "units"), KINDS[:3], ids=str)
def test_products_equal_plain_maths_whatever_the_rows(dtype, units, monkeypatch):
    from bdcli.backends.cpu.products import MAX_ROWS

    force(monkeypatch, units)
    for product, columns, width in ((rows_dot, 37, 32), (rows_dot, 5, 704), (scores, 48, 96), (scores, 16, 32)):
        w, x = randn(columns, width).to(dtype), randn(MAX_ROWS, width)
        x = x.bfloat16() if units == "dots" else x
        wanted = x.double() @ w.double().T
        together = product(w, x)
        assert (together - wanted).abs().max() < 1e-5 * wanted.abs().max() * math.sqrt(width)
        for rows in range(1, len(together)):  # bit for bit: a row does not know how many it is computed with
            assert torch.equal(product(w, x[:rows].contiguous()), together[:rows])


def test_exponential_and_rounding():
    x = -torch.cat((randn(1000).abs() * 20, torch.tensor([0.0, 1e-30, 86.9, 87.1, 1e30, torch.inf])))
    q = x.clone()
    entry("soften")(q.data_ptr(), len(q), -math.inf)
    wanted = torch.where(x < -87, 0, x.double().exp())
    assert ((q - wanted).abs() <= 3e-7 * wanted + 1e-37).all()


# -- whole forwards

SHAPES = [
    {"hidden": 64, "inner": 96, "dim": 32, "heads": 4, "kv_heads": 2},
    {"hidden": 96, "inner": 160, "dim": 64, "heads": 3, "kv_heads": 3, "biases": True, "vocab": 131},
    {"hidden": 32, "inner": 32, "dim": 96, "heads": 6, "kv_heads": 1, "qk_norm": True, "layers": 3},
    {"hidden": 64, "inner": 64, "dim": 128, "heads": 2, "kv_heads": 1, "vocab": 17},
]
VIEWS = {
    "full": None,
    "official": 64,
    "window": View(52, 4, 0, 9, True),
    "absolute": View(52, 4, 0, 9, False),
    "chunk": View(60, 4, 16, 9, True),
    "no sinks": View(40, 0, 0, 9, True),
}


def reader(engine, model, view, capacity):
    budget, view = (view, None) if isinstance(view, int) else (None, view)
    return engine.drafter(model, capacity, capacity, model.config.vocab_size, budget, view)


@pytest.mark.parametrize(("dtype", "units"), KINDS, ids=str)
@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"D{s['dim']}")
def test_forwards_equal_torchs(shape, kind, dtype, units, monkeypatch):
    """Rounds with drafts, rejections and a prompt that ends anywhere; bf16 is held to torch's own bf16 error."""
    force(monkeypatch, units)
    seed = int(torch.randint(10**6, (), generator=FRESH))
    exact = tiny_model(**shape, seed=seed, spread=0.15)
    model = tiny_model(**shape, seed=seed, spread=0.15, dtype=dtype)
    for prompt in (0, 3, 70, 131) if kind != "chunk" else (70, 131):
        ids = torch.randint(model.config.vocab_size, (prompt + 60,), generator=FRESH).tolist()
        plain, truth = (reader(torch_backend(), m, VIEWS[kind], prompt + 80) for m in (model, exact))
        fast = reader(pick_backend("compiled", [model], print), model, VIEWS[kind], prompt + 80)
        readers, at, errors, floor = (plain, truth, fast), prompt, [], []
        for each in readers:
            each.prefill(ids[:prompt])
        for rows, back in ((1, 0), (2, 0), (9, 4), (1, 0), (9, 9), (8, 3), (3, 0), (9, 0), (9, 2), (2, 1)):
            got, want, ours = (each.feed(ids[at : at + rows], rows) for each in readers)
            errors.append((ours - want).square().mean())
            floor.append((got - want).square().mean())
            at += rows - back
            for each in readers:
                each.rollback(at)
        error = torch.stack(errors).mean().sqrt() / want.std()
        assert error < (1e-5 if dtype is torch.float32 else 1.2 * torch.stack(floor).mean().sqrt() / want.std())
        assert fast.cache.peak_entries == plain.cache.peak_entries


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("kind", VIEWS)
def test_a_row_is_the_same_alone_and_among_others(kind, units, monkeypatch):
    """Bit for bit in bf16, across block and chunk borders: verification writes what plain decoding writes."""
    force(monkeypatch, units)
    model = tiny_model(**SHAPES[0], seed=3, dtype=torch.bfloat16)
    engine, prompt = pick_backend("compiled", [model], print), 505
    ids = torch.randint(41, (prompt + 40,), generator=FRESH).tolist()
    one, many = (reader(engine, model, VIEWS[kind], prompt + 60) for _ in range(2))
    for each in (one, many):
        each.prefill(ids[:prompt])
    for first, count in ((prompt, 10), (prompt + 10, 19), (prompt + 29, 3), (prompt + 32, 8)):
        alone = torch.cat([one.feed(ids[i : i + 1], 1) for i in range(first, first + count)])
        assert torch.equal(many.feed(ids[first : first + count], count), alone)


def test_long_feeds_are_read_in_parts_and_give_only_the_rows_asked_for():
    model = tiny_model(**SHAPES[0], seed=1)
    engine = pick_backend("compiled", [model], print)
    ids = torch.randint(41, (150,), generator=FRESH).tolist()
    plain, fast = (reader(e, model, None, 160) for e in (torch_backend(), engine))
    for tokens, rows in ((ids[:75], 3), (ids[75:80], 5), (ids[80:150], 66)):
        assert torch.allclose(fast.feed(tokens, rows), plain.feed(tokens, rows), atol=1e-4)


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
        fast = reader(pick_backend("compiled", [model], print), model, None, 720)
        fast.prefill(ids[:690])
        outputs.append(torch.cat([fast.feed(ids[690:697], 7), fast.feed(ids[697:698], 1)]))
        own.close()
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_saved_entries_come_back():
    model = tiny_model(**SHAPES[0], seed=2)
    fast = reader(pick_backend("compiled", [model], print), model, None, 120)
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


@pytest.mark.parametrize("kind", VIEWS)
def test_a_draft_is_what_torch_drafts(kind):
    model = tiny_model(**SHAPES[0], seed=4)
    ids = torch.randint(41, (140,), generator=FRESH).tolist()
    plain, fast = (
        reader(e, model, VIEWS[kind], 200) for e in (torch_backend(), pick_backend("compiled", [model], print))
    )
    greedy = Sampling()
    for each in (plain, fast):
        each.prefill(ids[:130])
    for length, gamma in ((131, 5), (133, 1), (134, 8), (140, 3)):
        drafts = [each.draft(ids[:length], gamma, greedy, FRESH)[0] for each in (plain, fast)]
        assert drafts[0] == drafts[1] and len(drafts[0]) == gamma
        for each in (plain, fast):
            each.rollback(length)


@pytest.mark.parametrize("law", [(0.7, 0, 1.0), (1.0, 0, 0.8), (1.3, 5, 1.0), (1.0, 7, 0.6)], ids=str)
def test_draws_follow_the_serving_distribution(law):
    """q is the law that torch computes from the same logits, and tokens are drawn from it."""
    temperature, top_k, top_p = law
    sampling = Sampling(temperature, top_k, top_p)
    model = tiny_model(**SHAPES[0], seed=6)
    plain, fast = (reader(e, model, None, 60) for e in (torch_backend(), pick_backend("compiled", [model], print)))
    for each in (plain, fast):
        each.prefill([1, 2, 3])
    wanted = sampling.distribution(plain.feed([4], 1))[0]
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
    target, drafter = tiny_model(**shape, seed=1), tiny_model(**shape, seed=2)
    engine = pick_backend("compiled", [target, drafter], print)
    prompt, plain = [1, 2, 3], reader(torch_backend(), target, None, 20)
    joint = law_of_two(sampling, plain, prompt, 5)
    run = Speculator(reader(engine, target, None, 20), reader(engine, drafter, None, 20), sampling, 0)
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
    engine = pick_backend("compiled", [model], print)
    for pair in ((broken, model), (model, broken)):
        run = Speculator(*(reader(engine, m, None, 40) for m in pair), Sampling(), 0)
        run.prefill([1, 2, 3])
        with pytest.raises(NonFiniteError, match="target" if pair[0] is broken else "drafter"):
            run.round(2)


def test_a_cache_refuses_what_it_has_no_room_for():
    model = tiny_model(**SHAPES[0], seed=0)
    engine = pick_backend("compiled", [model], print)
    full = reader(engine, model, None, 32)
    full.prefill(list(range(30)))
    with pytest.raises(RuntimeError, match="cannot hold"):
        full.feed([1, 2, 3], 1)
    ring = reader(engine, model, plan_view(40, "window", "rebased", 4, 90), 120)
    ring.prefill([1] * 90)
    ring.feed([1] * 6, 1)
    ring.rollback(80)
    with pytest.raises(RuntimeError, match="rolled back further"):
        ring.feed([1], 1)


def test_the_choice_of_engine_is_explained(monkeypatch):
    fits, odd = tiny_model(**SHAPES[0]), tiny_model()
    assert pick_backend("auto", [fits], print).name == "compiled"
    assert pick_backend("torch", [fits], print).name == "torch"
    engine = pick_backend("auto", [fits, odd], print)
    assert engine.name == "torch" and "hidden size 24 is no multiple of 32" in engine.detail
    with pytest.raises(UserError, match="--engine compiled cannot run here"):
        pick_backend("compiled", [odd], print)
    half = tiny_model(**SHAPES[0], dtype=torch.float16)
    assert "float16" in pick_backend("auto", [half], print).detail
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "aarch64" in pick_backend("auto", [fits], print).detail


@pytest.mark.slow
def test_the_speed_script_prints_every_step(tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "cpu_speed.py"
    words = ["--shapes", "pocket", "--contexts", "1024", "--rounds", "1"]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=True, cwd=tmp_path)
    (found,) = json.loads(done.stdout.splitlines()[-1])
    assert {"AR", "verify 9", "torch AR", "transformers AR bfloat16"} <= found["steps_ms"].keys()
    assert min(found["steps_ms"].values()) > 0 and len(found["draft_ms"]) == 4


def test_the_processor_decides_about_dot_products(monkeypatch):
    features = {"avx512bf16"}
    monkeypatch.setattr(support, "processor_features", lambda: features)
    for name, wanted in (("znver4", True), ("znver5", True), ("emeraldrapids", False)):
        monkeypatch.setattr("llvmlite.binding.get_host_cpu_name", lambda name=name: name)
        assert support.dots_pay() == wanted
    features.clear()
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_name", lambda: "znver3")
    assert not support.dots_pay()


def test_threads_honour_limits(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1, 2, 3})
    for given, wanted in (("", 4), ("2", 2), ("9", 4), ("3,2", 3), ("0", 4), ("x", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert support.thread_limit() == wanted


def test_threads_are_pinned_by_request(monkeypatch):
    from bdcli.backends.cpu.pool import Pool

    allowed = os.sched_getaffinity(0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1, 2})
    assert support.processors_to_keep(3) == [None, None, None]
    monkeypatch.setenv("BDCLI_PIN", "1")
    assert support.processors_to_keep(5) == [None, 1, 2, 0, 1]
    monkeypatch.undo()
    monkeypatch.setenv("BDCLI_PIN", "1")
    before = {t.native_id for t in threading.enumerate()}
    own = Pool(2)
    (new,) = {t.native_id for t in threading.enumerate()} - before
    wanted, deadline = {sorted(allowed)[1 % len(allowed)]}, time.monotonic() + 20
    while os.sched_getaffinity(new) != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    assert os.sched_getaffinity(new) == wanted and os.sched_getaffinity(0) == allowed
    own.close()


def test_the_plain_twins_are_the_caches_of_torch():
    assert (torch_backend().full, torch_backend().budget) == (FullCache, BudgetCache)
    assert all(issubclass(getattr(pick_backend("compiled", [], print), n), k) for n, k in
               (("full", FullCache), ("official", OfficialCache), ("budget", BudgetCache)))  # fmt: skip


def test_decoding_holds_little_beside_weights_and_entries():
    import bdcli.backends.cpu.runner  # noqa: F401  (compiled by now: compiling takes memory of its own)
    from bdcli.cli.doctor import decoding_memory

    whole, weights, kv, rest = map(int, re.findall(r"(\d+)(?: MB|\b)", decoding_memory(4096)))
    assert (weights, kv) == (27, 52) and abs(whole - weights - kv - rest) <= 2
    assert rest <= 300
