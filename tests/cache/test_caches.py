"""The caches against the view law written plainly (bd_kernels.reference), under random feeding and rollback."""

import random

import pytest
import torch
import torch.nn.functional as F
from bd_kernels.reference import budget_attention

from bdcli.base.errors import UserError
from bdcli.cache.budget import BudgetCache
from bdcli.cache.chunks import SCORING_QUERIES, choose_chunks, chunk_scores, official_chunks
from bdcli.cache.full import FullCache
from bdcli.cache.official import OfficialCache
from bdcli.cache.view import CHUNK_KEYS, View, gamma_limit, plan_view
from bdcli.model.rope import RopeTable
from tests.support.models import tiny_model


def plain_logits(model, ids, prompt, view: View, full_prompt: bool):
    """Logits of all positions by the law, layer by layer, query by query, in fp64."""
    c = model.config
    table = RopeTable(c.rope, len(ids) + view.budget, len(ids), torch.float64, "cpu")

    def rotate(x, p):
        return table.rotate(x[None, None], table.rows(slice(p, p + 1)))[0, 0]

    x = model.embedding.double()[torch.tensor(ids)]
    for layer in model.layers:
        wide = type(layer)(*(None if t is None else t.double() for t in (getattr(layer, n) for n in layer.__slots__)))
        qk, v = model.project(wide, x)
        q, k = qk[:, : c.heads], qk[:, c.heads :]
        chosen = chosen_by_law(view, q, k, prompt, table) if view.chosen else [[]] * c.kv_heads
        out = torch.zeros(len(ids), c.heads, c.head_dim, dtype=torch.float64)
        for t in range(len(ids)):
            for h in range(c.heads):
                g = h // (c.heads // c.kv_heads)
                inside = full_prompt and t < prompt
                window = t + 1 if inside else view.window
                kept = [] if t < prompt else chosen[g]
                out[t, h] = budget_attention(
                    q[t, h], k[:, g], v[:, g], t, view.sinks, kept, window, view.rebased and not inside, rotate
                )
        x = model.mix(wide, x, out.flatten(1))
    return F.rms_norm(x, (c.hidden_size,), model.norm.double(), c.norm_eps) @ model.head.double().T


def chosen_by_law(view, q, k, prompt, table):
    """Positions per KV head: best chunks between sinks and window, by the mean of the last queries."""
    end = prompt - view.window
    first = view.sinks + (end - view.sinks) % CHUNK_KEYS
    at = list(range(prompt - min(SCORING_QUERIES, prompt), prompt))
    places = [view.last_rank] * len(at) if view.rebased else at
    queries = table.rotate(q[at], table.rows(torch.tensor(places)))
    spots = torch.arange(first, end)
    if view.rebased:
        spots = (spots - first) % CHUNK_KEYS + view.sinks + (view.chosen - CHUNK_KEYS) // 2
    keys = table.rotate(k[first:end], table.rows(spots))
    group = queries.shape[1] // keys.shape[1]
    picked = []
    for h in range(keys.shape[1]):
        query = queries[:, h * group : (h + 1) * group].mean(0).sum(0)
        means = [keys[a : a + CHUNK_KEYS, h].mean(0) for a in range(0, end - first, CHUNK_KEYS)]
        order = sorted(range(len(means)), key=lambda i: -float(query @ means[i]))[: view.chosen // CHUNK_KEYS]
        picked.append([first + i * CHUNK_KEYS + j for i in sorted(order) for j in range(CHUNK_KEYS)])
    return picked


def feed_at_random(model, cache, ids, prompt, rng, gamma_max):
    """Logits [n - prompt, V] of the positions after the prompt, fed in odd blocks with rejected drafts in between."""
    model.prefill(ids[:prompt], cache)
    rows = []
    while cache.length < len(ids):
        block = ids[cache.length : cache.length + rng.randint(1, 3)]
        rows.append(model.forward(block, cache, len(block)))
        kept = cache.length
        for _ in range(rng.randint(0, min(gamma_max, cache.capacity - cache.length))):
            model.forward([rng.randrange(model.config.vocab_size)], cache, 1)
        cache.length = kept
    return torch.cat(rows)


CASES = [
    # budget, sinks, chosen, gamma_max, prompt, prefill block
    (24, 4, 0, 5, 61, 16),
    (17, 1, 0, 3, 9, 7),
    (40, 4, 0, 8, 3, 512),
    (64, 4, 16, 6, 97, 13),
    (33, 2, 8, 4, 75, 512),
]


@pytest.mark.parametrize("rebased", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("budget", "sinks", "chosen", "gamma_max", "prompt", "block"), CASES)
def test_budget_cache_obeys_the_law(budget, sinks, chosen, gamma_max, prompt, block, kv_heads, rebased, monkeypatch):
    monkeypatch.setattr("bdcli.model.llama.PREFILL_BLOCK", block)
    rng = random.Random(budget * 7 + kv_heads)
    model = tiny_model(kv_heads=kv_heads, seed=rng.randrange(99))
    ids = [rng.randrange(41) for _ in range(prompt + 43)]
    view = View(budget, sinks, chosen, gamma_max, rebased)
    cache = BudgetCache(model, len(ids) + gamma_max, view)
    got = feed_at_random(model, cache, ids, prompt, rng, gamma_max)
    want = plain_logits(model, ids, prompt, view, full_prompt=bool(chosen) and not rebased)[prompt:]
    assert (got - want).abs().max() < 2e-4 * want.abs().max()
    assert cache.peak_entries <= budget


def test_the_law_itself_bites():
    """The comparison above would notice a window that is one key too long."""
    model, ids = tiny_model(), list(range(40))
    view = View(24, 4, 0, 5, True)
    want = plain_logits(model, ids, 20, view, False)
    off_by_one = plain_logits(model, ids, 20, View(25, 4, 0, 5, True), False)
    assert (want - off_by_one).abs().max() > 1e-2 * want.abs().max()


@pytest.mark.parametrize("rebased", [True, False])
@pytest.mark.parametrize("select", ["window", "chunk"])
def test_a_budget_that_holds_everything_equals_the_full_cache(select, rebased):
    rng = random.Random(5)
    model = tiny_model(seed=3)
    ids = [rng.randrange(41) for _ in range(120)]
    view = plan_view(200, select, "rebased" if rebased else "absolute", 4, prompt=77)
    budget = feed_at_random(model, BudgetCache(model, 150, view), ids, 77, rng, 4)
    full = feed_at_random(model, FullCache(model, 150), ids, 77, rng, 4)
    assert torch.allclose(budget, full, atol=2e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: FullCache(m, 90),
        lambda m: OfficialCache(m, 90, 24),
        lambda m: BudgetCache(m, 90, View(24, 4, 0, 5, True)),
        lambda m: BudgetCache(m, 90, View(48, 4, 16, 5, True)),
    ],
)
def test_rollback_then_append_equals_never_having_appended(make):
    model = tiny_model(seed=8)
    prompt = [t % 41 for t in range(50, 111)]
    plain, rolled = make(model), make(model)
    for cache in (plain, rolled):
        model.prefill(prompt, cache)
    for token in (3, 1, 4, 1, 5):
        model.forward([token], rolled, 1)
    rolled.length = plain.length
    for token in (9, 2, 6, 5, 3, 5, 8):
        assert torch.equal(model.forward([token], plain, 1), model.forward([token], rolled, 1))


class CountingCache(BudgetCache):
    """Counts the distinct slots each layer and head ever had written, by looking for non-zero keys."""

    def entries(self) -> int:
        used = self.keys.abs().sum(2) > 0  # [L, Hkv, slots]
        return int(used.sum(-1).max())


@pytest.mark.parametrize(("select", "prompt"), [("window", 5), ("window", 300), ("chunk", 300)])
def test_two_thousand_tokens_stay_within_the_budget(select, prompt):
    model = tiny_model(layers=1)
    view = plan_view(64, select, "rebased", 8, prompt)
    cache = CountingCache(model, prompt + 2100, view)
    model.prefill([i % 41 for i in range(prompt)], cache)
    worst = cache.entries()
    for i in range(2000):
        model.forward([i * i % 41], cache, 1)
        if i % 3 == 0:
            for t in range(8):
                model.forward([t], cache, 1)
            cache.length -= 8
        worst = max(worst, cache.entries())
    assert worst <= cache.peak_entries <= 64
    assert cache.keys.shape[-1] == cache.values.shape[-2] == 64


def test_official_keeps_what_the_paper_says_and_reports_its_true_count():
    model = tiny_model(layers=1, seed=4)
    ids = [i * 7 % 41 for i in range(83)]
    full, official = FullCache(model, 120), OfficialCache(model, 120, 32)
    for cache in (full, official):
        model.prefill(ids, cache)
    keys = full.keys[0, :, :83]
    kept = official.keys[0, :, :32]
    for h in range(2):
        scores = [float(keys[h, -1] @ keys[h, a : a + 8].mean(0)) for a in range(0, 80, 8)]
        best = sorted({0, *sorted(range(1, 10), key=lambda i: -scores[i])[:3]})
        assert torch.equal(kept[h], torch.cat([keys[h, 8 * i : 8 * i + 8] for i in best]))
    assert official.peak_entries == 32
    for i in range(5):
        model.forward([i], official, 1)
    assert official.peak_entries == 37


def test_selection_functions_on_odd_shapes():
    g = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(56, 3, 6, generator=g), torch.randn(5, 6, 6, generator=g)
    scores = chunk_scores(queries, keys, 8)
    want = (queries.mean(0)[4] + queries.mean(0)[5]) @ keys[8:16, 2].mean(0) / 6**0.5
    assert torch.allclose(scores[2, 1], want, atol=1e-5)
    index = choose_chunks(scores, 3, 8)
    assert index.shape == (3, 24) and bool((index.diff(dim=1) > 0).all())
    assert official_chunks(keys[:5], 32, 8).shape == (3, 0)
    assert official_chunks(keys, 999, 8).shape == (3, 56)


def test_a_rollback_too_deep_is_refused():
    model = tiny_model(layers=1)
    cache = BudgetCache(model, 200, View(24, 4, 0, 5, True))
    model.prefill(list(range(40)), cache)
    for i in range(10):
        model.forward([i], cache, 1)
    cache.length -= 10
    with pytest.raises(RuntimeError, match="rolled back further"):
        model.forward([1], cache, 1)


def test_view_sizes():
    view = plan_view(512, "chunk", "rebased", None, prompt=4096)
    assert view.gamma_max == 16 and view.chosen % CHUNK_KEYS == 0 and view.chosen > 0
    assert view.sinks + view.chosen + view.window + view.gamma_max + 1 == 512
    assert plan_view(512, "chunk", "rebased", None, prompt=400).chosen == 0
    # the view does not depend on γ ...
    assert plan_view(512, "window", "rebased", 1, 4096) == plan_view(512, "window", "rebased", 16, 4096)
    # ... unless a longer draft or a tiny budget leaves no choice
    assert gamma_limit(512, 40) == 40 and gamma_limit(20, 3) == 3
    assert plan_view(4 + 3 + 2, "window", "rebased", 3, 100).window == 1
    with pytest.raises(UserError, match="4 sinks \\+ 3 draft tokens"):
        plan_view(4 + 3 + 1, "window", "rebased", 3, 100)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 3), (5, 1), (3, 3)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_bf16_prompt_is_read_in_the_dtype_that_multiplies_faster(monkeypatch, kind, heads, kv_heads):
    monkeypatch.setattr("bdcli.cache.causal.product_dtype", lambda _device: kind)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # three heads take two turns
    model = tiny_model(heads=heads, kv_heads=kv_heads, dtype=torch.bfloat16)
    cache, length = FullCache(model, 80), random.randrange(1, 71)
    cache.begin_prefill(length)
    cache.keys.normal_(), cache.values.normal_()
    q = torch.randn(length, heads, 8).bfloat16()
    exact = torch.cat(
        [
            causal_attention(q[:, h], *(x[1, h * kv_heads // heads, :length] for x in (cache.keys, cache.values)))
            for h in range(heads)
        ],
        1,
    )
    read = cache.read_prompt(1, q)
    assert read.dtype is torch.bfloat16 and read.shape == (length, heads * 8)
    torch.testing.assert_close(read.double(), exact, atol=0.04, rtol=0.02)


def causal_attention(q, k, v):
    """Plain causal attention of one head in fp64; q, k and v [T, D]."""
    scores = (q.double() @ k.double().T) * q.shape[1] ** -0.5
    return scores.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf).softmax(-1) @ v.double()
