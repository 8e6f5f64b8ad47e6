"""Every kernel against its eager twin: on a CUDA device (marker gpu), or on CPU where TRITON_INTERPRET=1 is set.

The yardstick of an error is what eager torch in the same precision makes of the same inputs, both against fp64.
Inputs are fresh every time; the seed is printed, and SEED repeats it. Unused and uninitialised memory holds NaN.
"""

import os
import random

import pytest
import torch
from bd_kernels import reference, variants

from tests.kernels.test_reference import WINDOWS, draft_state, random_verdict, rope_table

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
FACTOR = 4  # of the eager error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of the interpreter, about infinities
]


def cases(table):
    return [
        pytest.param(c, marks=[pytest.mark.slow] if i >= variants.USUAL else [], id=str(i)) for i, c in enumerate(table)
    ]


@pytest.fixture
def g():
    seed = int(os.environ.get("SEED", random.SystemRandom().randrange(2**31)))
    print("SEED", seed)
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty is filled with NaN, or with the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def cast(arguments, dtype):
    """Floating tensors of a dict of arguments, also inside tuples, in `dtype` on the device; the rest as it is."""

    def one(x):
        if isinstance(x, tuple):
            return tuple(map(one, x))
        if isinstance(x, torch.Tensor):
            return x.to(DEVICE, dtype if x.is_floating_point() else x.dtype)
        return x

    return {name: one(x) for name, x in arguments.items()}


def assert_within_budget(got, eager, truth, condition=1.0):
    """`condition` is how much the operation itself magnifies one rounding."""
    assert got.dtype is eager.dtype and got.shape == truth.shape
    rounding = torch.finfo(eager.dtype).eps / 2 * truth.abs().max() * condition
    budget = FACTOR * torch.maximum((eager.double() - truth).abs().max(), rounding)
    error = (got.double() - truth).abs().max()
    assert error <= budget, f"error {error:.3g} above {budget:.3g}"  # a NaN fails too


def compare(kernel, twin, arguments, dtype, **only_kernel):
    low = cast(arguments, dtype)
    assert_within_budget(kernel(**low, **only_kernel), twin(**low), twin(**cast(low, torch.float64)))


@pytest.mark.parametrize("shape", WINDOWS)
@pytest.mark.parametrize("case", cases(variants.DRAFT))
def test_draft_attention(case, shape, g):
    from bd_kernels.draft_attention import draft_attention

    arguments, _ = draft_state(g, case.dim, case.group, case.rows, case.query, case.indexed and shape[1] > 0, shape)
    for dtype in (case.dtype, torch.float32):
        compare(draft_attention, reference.draft_attention, arguments, dtype, splits=case.splits)


def test_draft_attention_of_a_real_budget(g):
    """Several tiles, views of a larger cache and of a fused projection, and more splits than tiles."""
    from bd_kernels.draft_attention import draft_attention

    arguments, _ = draft_state(g, 64, 2, 1, "raw", False, (4, 64, 199, 16, [300, 700]))
    low = cast(arguments, torch.float32)
    for name in ("k", "v"):
        layers = torch.full((2, 3, *low[name].shape[1:]), torch.nan, device=DEVICE)
        low[name] = layers[:, 1].copy_(low[name])
    wide = torch.full((2, 1, 9, 64), torch.nan, device=DEVICE)
    wide[:, :, :4] = low["q"]
    truth = reference.draft_attention(**cast(low, torch.float64))
    eager = reference.draft_attention(**low)
    for splits in (1, 2, 9):
        out = torch.full_like(low["q"], torch.nan)
        assert draft_attention(**low | {"q": wide[:, :, :4]}, splits=splits, out=out) is out
        assert_within_budget(out, eager, truth)


def verify_state(g, dim, group, rows, lengths, capacity, kv_heads=2):
    n = len(lengths)
    arguments = {
        "q": torch.randn(n, rows, kv_heads * group, dim, generator=g, dtype=torch.float64),
        "k": torch.randn(n, kv_heads, capacity, dim, generator=g, dtype=torch.float64),
        "v": torch.randn(n, kv_heads, capacity, dim, generator=g, dtype=torch.float64),
        "length": torch.tensor(lengths),
    }
    for i, length in enumerate(lengths):
        arguments["k"][i, :, length + rows :] = arguments["v"][i, :, length + rows :] = torch.nan
    return arguments


@pytest.mark.parametrize("lengths", ["odd", "whole tiles"])
@pytest.mark.parametrize("case", cases(variants.VERIFY))
def test_verify_attention(case, lengths, g):
    from bd_kernels.verify_attention import verify_attention

    lengths = {"odd": [0, 257], "whole tiles": [128 - case.rows, 63]}[lengths]
    arguments = verify_state(g, case.dim, case.group, case.rows, lengths, 300)
    for dtype in (case.dtype, torch.float32):
        compare(verify_attention, reference.verify_attention, arguments, dtype, splits=case.splits)


def means(keys):
    """|mean key| [C, Hkv, D] of chunks of 8: with |query| the size of a score's terms, which may cancel each other."""
    return keys.double().view(-1, 8, *keys.shape[1:]).mean(1).abs()


@pytest.mark.parametrize("case", cases(variants.CHUNKS))
@pytest.mark.parametrize("chunks", [1, 37])
def test_chunk_scores(case, chunks, g):
    from bd_kernels import chunk_select as c

    keys = torch.randn(8 * chunks + 3, 2, case.dim, generator=g, dtype=torch.float64)
    queries = torch.randn(5, 2 * case.group, case.dim, generator=g, dtype=torch.float64)
    table = rope_table(case.dim, 40)
    rope = (table.cos[20:28, 0], table.sin[20:28, 0]) if case.rotate else None
    arguments = {"queries": queries, "keys": keys[: 8 * chunks], "chunk": 8, "rope": rope}
    for dtype in (case.dtype, torch.float32):
        low = cast(arguments, dtype)
        truth, eager = reference.chunk_scores(**cast(low, torch.float64)), reference.chunk_scores(**low)
        size = reference.chunk_scores(low["queries"].double().mean(0)[None].abs(), means(low["keys"]), 1)
        assert_within_budget(c.chunk_scores(**low), eager.float(), truth, float(size.max() / truth.abs().max()))
        whole = keys.to(DEVICE, dtype)
        got, truth = c.official_scores(whole, 8), reference.official_scores(whole.double(), 8)
        assert (got[:, 0] == torch.inf).all()
        if chunks > 1:
            assert_within_budget(got[:, 1:], reference.official_scores(whole, 8).float()[:, 1:], truth[:, 1:])


@pytest.mark.parametrize("case", cases(variants.CHUNKS))
def test_choice_and_compaction(case, g):
    from bd_kernels import chunk_select as c

    keys, values = (torch.randn(101, 2, case.dim, generator=g).to(DEVICE, case.dtype) for _ in range(2))
    index = c.choose_chunks(torch.randn(2, 12, generator=g).to(DEVICE), 5, 8)
    assert index.shape == (2, 40) and bool((index.diff(dim=1) > 0).all())
    table = rope_table(case.dim, 60)
    rope = tuple(x[4:44, 0].to(DEVICE, case.dtype) for x in (table.cos, table.sin)) if case.rotate else None
    caches = [torch.full((2, 50, case.dim), torch.nan, dtype=case.dtype, device=DEVICE) for _ in range(4)]
    c.compact(keys, values, index, *(x[:, 4:44] for x in caches[:2]), rope=rope)
    reference.compact(keys, values, index, *(x[:, 4:44] for x in caches[2:]), rope=rope)
    truth = torch.zeros(2, 40, case.dim, dtype=torch.float64, device=DEVICE)
    wide = rope and tuple(x.double() for x in rope)
    reference.compact(keys.double(), values.double(), index, truth, truth.clone(), rope=wide)
    assert_within_budget(caches[0][:, 4:44], caches[2][:, 4:44], truth)
    assert torch.equal(caches[1][:, 4:44], caches[3][:, 4:44])
    assert all(x[:, :4].isnan().all() and x[:, 44:].isnan().all() for x in caches)


@pytest.mark.parametrize("case", cases(variants.LAYERS))
def test_layer_rotates_and_stores(case, g):
    from bd_kernels.between import rotate_store

    rows, heads, kv_heads, table = 3, 4, 2, rope_table(case.dim, 50)
    wide = torch.randn(rows, heads + 2 * kv_heads, case.dim, generator=g, dtype=torch.float64)
    rope = table.cos[:, 0], table.sin[:, 0]
    given = {"wide": wide, "rope": rope, "positions": torch.tensor([7, 8, 49]), "slots": torch.tensor([5, 0, 2])}

    def run(function, arguments):
        qk, v = arguments["wide"].split((heads + kv_heads, kv_heads), 1)  # views of one product, as in a layer
        layers = torch.full((2, 2, kv_heads, 6, case.dim), torch.nan, dtype=qk.dtype, device=DEVICE)
        places = (arguments[name] for name in ("positions", "slots", "rope"))
        q = function(qk, v, layers[0, 1], layers[1, 1], *places, case.rotate_q)
        assert layers[:, 0].isnan().all() and layers[:, 1, :, [1, 3, 4]].isnan().all()
        return q, layers[:, 1, :, [0, 2, 5]]

    low = cast(given, case.dtype)
    got, eager, truth = (
        run(rotate_store, low),
        run(reference.rotate_store, low),
        run(reference.rotate_store, cast(low, torch.float64)),
    )
    for parts in zip(got, eager, truth):
        assert_within_budget(*parts)


@pytest.mark.parametrize("case", cases(variants.LAYERS))
def test_layer_adds_and_norms_and_gates(case, g):
    from bd_kernels import between

    x, y, weight = (
        torch.randn(*s, generator=g, dtype=torch.float64) for s in ((3, case.width),) * 2 + ((case.width,),)
    )
    low = cast({"x": x, "y": y, "weight": weight}, case.dtype)
    truth = cast(low, torch.float64)
    results = []
    for function, arguments in ((between.add_norm, low), (reference.add_norm, low), (reference.add_norm, truth)):
        stream = arguments["x"].clone()
        results.append((function(stream, arguments["y"], arguments["weight"], 1e-5), stream))
    for parts in zip(*results):
        assert_within_budget(*parts)
    rows = torch.randn(3, 2 * case.inner, generator=g).to(DEVICE, case.dtype)
    assert_within_budget(between.gate(rows), reference.gate(rows), reference.gate(rows.double()))


@pytest.mark.parametrize("case", [pytest.param(c, id=f"{c.kind} {c.dtype}") for c in variants.LOSSES])
def test_head_loss(case, g):
    from bd_kernels.head_loss import loss_rows

    vocab, rows = 4200, 9
    y = 3 * torch.randn(rows, vocab, generator=g, dtype=torch.float64)
    z = y + torch.randn(rows, 1, generator=g).abs() * torch.randn(rows, vocab, generator=g)  # acceptance high and low
    z[0] = y[0]  # ties everywhere
    y[:, 4100:] = z[:, 4100:] = -torch.inf  # a padded vocabulary
    z[1], y[1, :4100] = 0, 0
    z[1, 5], y[1, 9] = 50, 50  # hardly any overlap
    scale = torch.rand(rows, generator=g).to(DEVICE)
    scale[3] = 0

    def run(function, arguments):
        logits = arguments["z"].clone()
        losses, alpha, hit = function(logits, arguments["y"], case.kind, 0.8, scale)
        return losses, alpha, logits, hit

    low = cast({"z": z, "y": y}, case.dtype)
    got, eager, truth = (
        run(loss_rows, low),
        run(reference.loss_rows, low),
        run(reference.loss_rows, cast(low, torch.float64)),
    )
    assert torch.equal(got[3], eager[3]) and bool(got[3][0])
    for parts in zip(got[:3], eager, truth):
        # exp magnifies the rounding of a log-probability, of which an fp32 comparison consists, by its size
        condition = 40.0 if parts[1].dtype is torch.float32 else 1.0
        assert_within_budget(*parts, condition)
    untouched = low["z"].clone()
    for mine, his in zip(loss_rows(untouched, low["y"], case.kind, 0.8), got[:2]):
        assert torch.equal(mine, his)
    assert torch.equal(untouched, low["z"])


@pytest.mark.parametrize("case", [pytest.param(c, id=f"{c.kind} {c.dtype}") for c in variants.LOSSES[:4]])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_head_loss_of_broken_rows_is_no_acceptance(case, broken, g):
    from bd_kernels.head_loss import loss_rows

    for side in (0, 1):
        pair = [torch.randn(2, 2100, generator=g).to(DEVICE, case.dtype) for _ in range(2)]
        pair[side][1, 2070] = broken
        losses, alpha, hit = loss_rows(*pair, case.kind, 1.0)
        assert losses.isfinite().tolist() == alpha.isfinite().tolist() == [True, False] and not hit[1]


@pytest.mark.parametrize("case", [pytest.param(c, id=f"{c.gamma} of {c.vocab}") for c in variants.ACCEPTS])
def test_accept_greedy(case, g):
    from bd_kernels.accept import accept_greedy

    n = 5
    logits = torch.randn(n, case.gamma + 1, case.vocab, generator=g).to(case.dtype)  # in low precision with real ties
    best = logits[:, : case.gamma].argmax(-1)
    right = torch.rand(best.shape, generator=g) < 0.9
    right[0] = True
    draft = torch.where(right, best, (best + 1) % case.vocab).to(DEVICE)
    logits = logits.to(DEVICE)
    logits[3, case.gamma, case.vocab - 1] = torch.nan
    logits[4, 0, 0] = torch.inf
    assert_same_verdict(accept_greedy, reference.accept_greedy, draft, logits)


def assert_same_verdict(kernel, twin, draft, *arguments):
    n = draft.shape[0]
    start = torch.arange(n, device=DEVICE).flip(0) * 3
    ids = torch.full((n, 3 * n - 2), 7, device=DEVICE)  # the first sequence has room for one token only
    mine, his = (ids, start), (ids.clone(), start.clone())
    got, want = kernel(draft, *arguments, *mine), twin(draft, *arguments, *his)
    assert (want[1] == -1).sum() == 2, "two broken rows"
    assert torch.equal(got.accepted, want[1]) and torch.equal(got.tokens, want[0])
    assert torch.equal(mine[0], his[0]) and torch.equal(mine[1], his[1])
    alone = kernel(draft, *arguments)
    assert torch.equal(alone.tokens, got.tokens) and torch.equal(alone.accepted, got.accepted)


@pytest.mark.parametrize("case", [pytest.param(c, id=f"{c.gamma} of {c.vocab}") for c in variants.ACCEPTS])
def test_accept_sampled(case, g):
    from bd_kernels.accept import accept_sampled

    n, gamma = 8, case.gamma
    draft, q, p, uniform = (x.to(DEVICE) for x in random_verdict(g, gamma, case.vocab, n))
    p[6:, 0] = torch.nan
    if gamma:
        uniform[:3, 0] = 0.9999  # rejections, of a draft that p hardly allows
        p[:3, 0, :].scatter_(1, draft[:3, :1], 0.0)
        p[2, 0] = q[2, 0]  # and one without a residual
        q[2, 0, draft[2, 0]] *= 4
        p[2, 0, draft[2, 0]] = 0.0
        q[2, 0] = torch.maximum(q[2, 0], p[2, 0])
    got, want = accept_sampled(draft, q, p, uniform), reference.accept_sampled(draft, q, p, uniform)
    assert torch.equal(got.accepted, want[1])
    for i in range(n):
        a = int(got.accepted[i])
        if a < 0:
            assert (got.tokens[i] == -1).all() and i >= 6
            continue
        assert got.tokens[i, :a].tolist() == draft[i, :a].tolist() and (got.tokens[i, a + 1 :] == -1).all()
        law = p[i, a].double()
        if a < gamma and float((law - q[i, a]).clamp_min(0).sum()) > 0:
            law = (law - q[i, a]).clamp_min(0)
        token, goal = int(got.tokens[i, a]), float(uniform[i, gamma] * law.sum())
        end = float(law[: token + 1].sum())
        slack = 1e-5 * float(law.sum())  # of fp32 sums
        assert law[token] > 0 and end - float(law[token]) - slack <= goal <= end + slack
    if case.vocab < 1000:  # few enough that no sum falls within rounding of a uniform
        assert_same_verdict(accept_sampled, reference.accept_sampled, draft[-6:], q[-6:], p[-6:], uniform[-6:])


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_one_graph_serves_every_length(g):
    from bd_kernels.accept import accept_greedy
    from bd_kernels.draft_attention import draft_attention
    from bd_kernels.verify_attention import verify_attention

    drafts = [draft_state(g, 64, 2, 1, "raw", False, (4, 0, 100, 16, [start])) for start in (300, 411)]
    draft, other = (cast(arguments, torch.float16) for arguments, _ in drafts)
    table = cast({"rope": max((d["rope"] for d in (draft, other)), key=lambda r: r[0].shape[0])}, torch.float16)
    verify = cast(verify_state(g, 64, 2, 4, [2000], 4096), torch.float16)
    later = cast(verify_state(g, 64, 2, 4, [3777], 4096), torch.float16)
    logits, guesses = torch.randn(1, 4, 5000, device=DEVICE), torch.randint(0, 5000, (1, 3), device=DEVICE)
    guesses[0, 0] = logits[0, 0].argmax()
    ids, length = torch.zeros(1, 100, dtype=torch.int64, device=DEVICE), torch.tensor([0], device=DEVICE)

    def round_():
        return (
            draft_attention(**draft | table),
            verify_attention(**verify),
            accept_greedy(guesses, logits, ids, length),
        )

    round_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = round_()
    for name in ("q", "k", "v", "position"):
        draft[name].copy_(other[name])
    for name in ("q", "k", "v", "length"):
        verify[name].copy_(later[name])
    length.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for got, twin, arguments in (
        (outputs[0], reference.draft_attention, draft | table),
        (outputs[1], reference.verify_attention, verify),
    ):
        assert_within_budget(got, twin(**arguments), twin(**cast(arguments, torch.float64)))
    assert int(length) == int(outputs[2].accepted) + 1 >= 2
