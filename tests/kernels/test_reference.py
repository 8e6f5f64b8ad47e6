"""The kernels' eager twins against the law, against plain maths in fp64, and against what `bdcli` computes on CPU."""

import itertools
import random
import subprocess
import sys

import pytest
import torch
from bd_kernels import reference

from bdcli.cache.budget import BudgetCache
from bdcli.cache.chunks import chunk_scores, official_chunks
from bdcli.cache.view import View
from bdcli.model.config import RopeConfig
from bdcli.model.rope import RopeTable
from bdcli.speculation.sampling import verify_greedy, verify_sampled
from tests.support.models import tiny_model

WINDOWS = [  # sinks, chosen, window, gamma_max, positions of the first row
    (4, 0, 7, 5, [2, 61]),
    (1, 0, 19, 20, [0, 19]),
    (4, 16, 30, 18, [77, 300]),
    (0, 0, 5, 18, [3, 40]),
    (3, 8, 1, 18, [50, 51]),
]


def rope_table(dim, length):
    return RopeTable(RopeConfig("default", 10000.0, dim, 4096), length, length, torch.float64, "cpu")


def draft_state(g, dim, group, rows, query, indexed, shape, kv_heads=2):
    """(arguments of draft_attention in fp64, law [N, R, H, D]) for random text; NaN wherever nobody may look."""
    sinks, chosen, window, gamma_max, starts = shape
    rows = min(rows, gamma_max + 2)
    ring, prefix, heads = window + gamma_max + 1, sinks + chosen, kv_heads * group
    table = rope_table(dim, max(starts) + rows + 1)

    def rotate(x, p):
        return table.rotate(x[None, None], table.rows(slice(p, p + 1)))[0, 0]

    def randn(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    spread = prefix + 3 * chosen  # a list of slots may point anywhere between the sinks and the ring
    ring_start = spread if indexed else prefix
    shape = (len(starts), kv_heads, ring_start + ring, dim)
    keys, values = torch.full(shape, torch.nan, dtype=torch.float64), torch.full(shape, torch.nan, dtype=torch.float64)
    index = torch.zeros(len(starts), kv_heads, chosen, dtype=torch.int32)
    q = randn(len(starts), rows, heads, dim)
    law = torch.empty_like(q)
    rebased = query != "one"
    for n, start in enumerate(starts):
        newest = start + rows - 1
        k, v = randn(kv_heads, newest + 1, dim), randn(kv_heads, newest + 1, dim)
        for h in range(kv_heads):
            middle = torch.randperm(max(start - window - sinks + 1, 0), generator=g)[:chosen] + sinks
            places = sorted(middle.tolist())
            slots = list(range(sinks, prefix))
            if indexed:
                slots = (torch.randperm(spread - sinks, generator=g)[:chosen] + sinks).tolist()
                index[n, h] = torch.tensor(slots)
            for p in range(min(sinks, newest + 1)):
                keys[n, h, p], values[n, h, p] = rotate(k[h, p], p), v[h, p]
            for rank, (slot, p) in enumerate(zip(slots, places, strict=True), sinks):
                keys[n, h, slot], values[n, h, slot] = rotate(k[h, p], rank if rebased else p), v[h, p]
            stale = gamma_max + 2 - rows  # a rejected tail written before
            for p in range(max(sinks, newest + 1 - ring), newest + 1 + stale):
                slot = ring_start + p % ring
                keys[n, h, slot] = rotate(k[h, p], p) if p <= newest else torch.nan
                values[n, h, slot] = v[h, p] if p <= newest else torch.nan
            for r, i in itertools.product(range(rows), range(group)):
                head = h * group + i
                law[n, r, head] = reference.budget_attention(
                    q[n, r, head], k[h], v[h], start + r, sinks, places, window, rebased, rotate
                )
    position = torch.tensor(starts)
    at = position[:, None] + torch.arange(rows)
    arguments = {"k": keys, "v": values, "position": position, "sinks": sinks, "chosen": chosen}
    arguments |= {"window": window, "ring": ring}
    cos, sin = table.cos[:, 0], table.sin[:, 0]
    if indexed:
        arguments |= {"index": index, "ring_start": ring_start}
    if query == "raw":
        return {"q": q, "rope": (cos, sin), **arguments}, law
    ranks = at.clamp(max=prefix + window - 1)
    arguments["q"] = reference.rotated(q, cos[at][:, :, None], sin[at][:, :, None])
    if rebased:
        arguments["q_rank"] = reference.rotated(q, cos[ranks][:, :, None], sin[ranks][:, :, None])
    return arguments, law


@pytest.mark.parametrize("query", ["one", "two", "raw"])
@pytest.mark.parametrize("shape", WINDOWS)
@pytest.mark.parametrize(("rows", "indexed"), [(1, False), (4, True)])
def test_draft_attention_is_the_law(shape, query, rows, indexed):
    g = torch.Generator().manual_seed(rows)
    arguments, law = draft_state(g, 6, 3, rows, query, indexed, shape)
    torch.testing.assert_close(reference.draft_attention(**arguments), law, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rebased", [True, False])
@pytest.mark.parametrize(("prompt", "chosen"), [(2, 0), (90, 0), (90, 16)])
def test_draft_attention_is_what_the_cache_computes(prompt, chosen, rebased):
    rng = random.Random(prompt + chosen)
    model, view = tiny_model(layers=1), View(64, 4, chosen, 6, rebased)
    cache = BudgetCache(model, 300, view)
    model.prefill([rng.randrange(41) for _ in range(prompt)], cache)
    for fed in range(120):
        rows = rng.randint(1, 3)
        x = model.embed([rng.randrange(41) for _ in range(rows)])
        qk, v = model.project(model.layers[0], x)
        start, plan = cache.length, cache.plan(cache.length, rows)
        got = cache.read(0, plan, cache.write(0, plan, qk, v))
        q, rope = qk[None, :, : cache.heads], (cache.rope.cos[:, 0], cache.rope.sin[:, 0])
        if not rebased:
            q, rope = cache.rope.rotate(q[0], plan[2])[None], None
        k, v = cache.keys[0].transpose(1, 2)[None], cache.values[0][None]
        position = torch.tensor([start])
        want = reference.draft_attention(q, k, v, position, 4, chosen, view.window, view.ring, rope=rope)
        torch.testing.assert_close(got, want[0].flatten(1), rtol=1e-4, atol=1e-5)
        cache.length += rng.randint(0, rows) if fed > 3 else rows


def test_verify_attention_is_softmax_written_out():
    g = torch.Generator().manual_seed(1)
    q = torch.randn(2, 3, 4, 5, generator=g, dtype=torch.float64)
    k, v = (torch.randn(2, 2, 20, 5, generator=g, dtype=torch.float64) for _ in range(2))
    length = torch.tensor([0, 11])
    for n, used in enumerate(length + 3):
        k[n, :, used:], v[n, :, used:] = torch.nan, torch.nan
    got = reference.verify_attention(q, k, v, length)
    for n, r, h in itertools.product(range(2), range(3), range(4)):
        seen = int(length[n]) + r + 1
        weights = (k[n, h // 2, :seen] @ q[n, r, h] / 5**0.5).exp()
        torch.testing.assert_close(got[n, r, h], weights @ v[n, h // 2, :seen] / weights.sum())


def test_chunk_scores_are_those_of_the_caches():
    g = torch.Generator().manual_seed(2)
    keys, queries = torch.randn(59, 3, 6, generator=g), torch.randn(5, 6, 6, generator=g)
    torch.testing.assert_close(reference.chunk_scores(queries, keys[:56], 8), chunk_scores(queries, keys[:56], 8))
    best = reference.official_scores(keys, 8).topk(4).indices.sort().values
    assert torch.equal(best, official_chunks(keys, 32, 8)[:, ::8] // 8)
    table = rope_table(6, 30)
    rows, keys, queries = table.rows(slice(20, 28)), keys[:56].double(), queries.double()
    rotated = torch.cat([table.rotate(part, rows) for part in keys.split(8)])
    got = reference.chunk_scores(queries, keys, 8, rope=(rows[0][:, 0], rows[1][:, 0]))
    torch.testing.assert_close(got, reference.chunk_scores(queries, rotated, 8))


def test_compaction_gathers_and_rotates_to_ranks():
    g, table = torch.Generator().manual_seed(3), rope_table(6, 30)
    keys, values = (torch.randn(40, 2, 6, generator=g, dtype=torch.float64) for _ in range(2))
    index = torch.stack([torch.randperm(40, generator=g)[:16] for _ in range(2)]).to(torch.int32)
    kept_keys, kept_values = torch.zeros(2, 16, 6, dtype=torch.float64), torch.zeros(2, 16, 6, dtype=torch.float64)
    rope = tuple(x[4:20, 0] for x in (table.cos, table.sin))
    reference.compact(keys, values, index, kept_keys, kept_values, rope=rope)
    for h, i in itertools.product(range(2), range(16)):
        p = int(index[h, i])
        want = table.rotate(keys[p : p + 1, h : h + 1], table.rows(slice(4 + i, 5 + i)))
        torch.testing.assert_close(kept_keys[h, i], want[0, 0])
        assert torch.equal(kept_values[h, i], values[p, h])


def plain_loss(z, y, kind, mix=None):
    """One row by the definitions. `mix` frozen, as the stop-gradient has it, makes lk differentiable by differences."""
    q, p = z.exp() / z.exp().sum(), y.exp() / y.exp().sum()
    kl = sum(float(pi) * (pi.log() - qi.log()) for pi, qi in zip(p, q))
    alpha = sum(min(pi, qi) for pi, qi in zip(p, q))
    mix = (-3 * alpha).exp() if mix is None else mix
    losses = {"ce": -q[y.argmax()].log(), "kl": kl, "log_alpha": -alpha.log(), "lk": mix * kl + (1 - mix) * (1 - alpha)}
    return losses[kind]


@pytest.mark.parametrize("kind", ["ce", "kl", "log_alpha", "lk"])
def test_head_loss_by_definition_and_by_differences(kind):
    g, tau = torch.Generator().manual_seed(4), 0.7
    z, y = (torch.randn(3, 9, generator=g, dtype=torch.float64) for _ in range(2))
    weights, slopes = torch.tensor([0.5, 0.0, 2.0]), z.clone()
    losses, alpha, hit = reference.loss_rows(slopes, y, kind, tau, weights)
    assert hit.tolist() == (z.argmax(-1) == y.argmax(-1)).tolist()
    for row, target, loss in zip(z / tau, y / tau, losses):
        torch.testing.assert_close(plain_loss(row, target, kind), loss)
    mixes, moves, ends = (-3 * alpha).exp(), torch.randn(z.shape, generator=g, dtype=torch.float64), []
    for sign in (1, -1):
        moved = (z + sign * 1e-6 * moves) / tau
        ends.append(sum(w * plain_loss(*row, kind, m) for w, m, *row in zip(weights, mixes, moved, y / tau)))
    torch.testing.assert_close((slopes * moves).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-6)


def random_verdict(g, gamma, vocab, n=1):
    """(draft, q, p, uniform): drafts drawn from q, p not far from it."""
    base = torch.randn(n, gamma + 1, vocab, generator=g)
    q = (base + 0.5 * torch.randn(base.shape, generator=g))[:, :gamma].softmax(-1)
    p = base.softmax(-1)
    draft = torch.multinomial(q.flatten(0, 1), 1, generator=g).view(n, gamma) if gamma else torch.zeros(n, 0).long()
    return draft, q, p, torch.rand(n, gamma + 1, generator=g)


@pytest.mark.parametrize("gamma", [0, 1, 5])
def test_greedy_verdicts_are_those_of_the_engine(gamma):
    g = torch.Generator().manual_seed(gamma)
    for _ in range(40):
        logits = torch.randn(1, gamma + 1, 11, generator=g)
        right = torch.rand(1, gamma, generator=g) < 0.7
        draft = torch.where(right, logits[:, :gamma].argmax(-1), torch.randint(0, 11, (1, gamma), generator=g))
        want = verify_greedy(draft[0].tolist(), logits[0])
        tokens, accepted = reference.accept_greedy(draft, logits)
        assert tokens[0].tolist() == want.tokens + [-1] * (gamma - want.accepted) and int(accepted) == want.accepted


@pytest.mark.parametrize("gamma", [0, 1, 5])
def test_sampled_verdicts_are_those_of_the_engine(gamma):
    g = torch.Generator().manual_seed(gamma + 10)
    for seed in range(60):
        draft, q, p, _ = random_verdict(g, gamma, 11)
        want = verify_sampled(draft[0].tolist(), q[0], p[0], torch.Generator().manual_seed(seed))
        same = torch.rand(gamma, generator=torch.Generator().manual_seed(seed))
        tokens, accepted = reference.accept_sampled(draft, q, p, torch.cat((same, torch.rand(1)))[None])
        assert int(accepted) == want.accepted
        assert tokens[0, : want.accepted].tolist() == want.tokens[: want.accepted]


def test_the_drawn_token_follows_the_residual_and_the_bonus_follows_p():
    g = torch.Generator().manual_seed(6)
    draft, q, p, _ = random_verdict(g, 1, 7)
    p[0, 0, draft[0, 0]], q[0, 0, draft[0, 0]] = 0.05, 0.6
    residual = (p[0, 0] - q[0, 0]).clamp_min(0)
    grid = 2000
    for test, law in ((0.999, residual / residual.sum()), (0.0, p[0, 1] / p[0, 1].sum())):
        counts = torch.zeros(7)
        for i in range(grid):
            uniform = torch.tensor([[test, (i + 0.5) / grid]])
            tokens, accepted = reference.accept_sampled(draft, q, p, uniform)
            assert int(accepted) == (test == 0.0)
            counts[tokens[0, int(accepted)]] += 1
        assert (counts / grid - law).abs().max() < 1.5 / grid


def test_no_residual_means_p_and_broken_rows_are_told():
    p = torch.tensor([[[0.0, 0.4, 0.6], [0.2, 0.3, 0.5]]])
    draft, q = torch.tensor([[0]]), p[:, :1].clone()
    tokens, accepted = reference.accept_sampled(draft, q, p, torch.tensor([[0.5, 0.39]]))
    assert tokens.tolist() == [[1, -1]] and accepted.tolist() == [0]
    ids, length = torch.zeros(1, 5, dtype=torch.long), torch.tensor([2])
    p[0, 0, 0] = torch.nan
    assert reference.accept_sampled(draft, q, p, torch.rand(1, 2), ids, length)[1].tolist() == [-1]
    assert reference.accept_greedy(draft, p.log(), ids, length)[1].tolist() == [-1]
    assert length.tolist() == [2] and not ids.any()


def test_verdicts_are_appended():
    ids, length = torch.full((2, 4), 9), torch.tensor([0, 3])
    logits = torch.eye(5)[torch.tensor([[1, 2, 3], [4, 0, 1]])]
    reference.accept_greedy(torch.tensor([[1, 2], [4, 1]]), logits, ids, length)
    assert ids.tolist() == [[1, 2, 3, 9], [9, 9, 9, 4]] and length.tolist() == [3, 5]


def test_the_package_imports_without_triton_and_kernels_without_a_gpu():
    without = (
        "import sys; sys.modules['triton'] = None; import bd_kernels, bd_kernels.reference, bd_kernels.variants;"
        "import bdcli.backends.select, bdcli.cli.doctor, bdcli.backends.cuda.runner, bdcli.backends.cuda.caches;"
        "import bdcli.train.distill.run;"
        "from bdcli.backends.cuda.ops import ops_for; ops_for('cpu'); bdcli.backends.select.static_backend('plain', '')"
    )
    names = ["accept", "chunk_select", "draft_attention", "head_loss", "verify_attention"]
    no_gpu = "import torch, " + ", ".join(f"bd_kernels.{name}" for name in names)
    no_gpu += "; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", without], check=True)
    pytest.importorskip("triton")
    subprocess.run([sys.executable, "-c", no_gpu], check=True)
