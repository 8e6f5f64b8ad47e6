"""Compiled causal attention of prompts against fp64 and against torch's own."""

from __future__ import annotations

import pytest
import torch

from bdcli.backends.causal import causal_attention as attend_texts
from bdcli.cache.causal import causal_attention as plain_attention
from tests.support.cli import compiled_only
from tests.support.compiled import randn
from tests.support.models import tiny_model

pytestmark = compiled_only

LENGTHS = [1, 2, 15, 16, 17, 127, 128, 129, 511, 512, 513, 1025]
GROUPS = {1: 2, 2: 1, 3: 2, 4: 1, 8: 1}  # query heads of a KV head: KV heads
DTYPES = [torch.float32, torch.bfloat16]


def compiled(q, k, v, scale=None):
    from bdcli.backends.cpu.prompt.attention import causal_attention

    return causal_attention(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)


def exact(q, k, v, scale=None):
    """Plain causal attention in fp64."""
    length, heads, dim = q.shape
    k, v = (x.double().repeat_interleave(heads // len(x), 0) for x in (k, v))
    scores = torch.einsum("thd,hsd->hts", q.double(), k) * (dim**-0.5 if scale is None else scale)
    scores.masked_fill_(torch.ones(length, length).triu(1).bool(), -torch.inf)
    return torch.einsum("hts,hsd->thd", scores.softmax(-1), v)


def inputs(length, group, kv_heads, dim, dtype):
    """Fresh queries [T, H, D], keys and values [Hkv, T, D]."""
    return randn(length, group * kv_heads, dim).to(dtype), *(randn(kv_heads, length, dim).to(dtype) for _ in range(2))


def error(found, wanted):
    return float((found.double() - wanted).abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_length_and_group_equals_plain_maths(length, dtype):
    for i, (group, kv_heads) in enumerate(GROUPS.items()):
        q, k, v = inputs(length, group, kv_heads, (32, 64, 96, 128)[(i + length) % 4], dtype)
        found, wanted = compiled(q, k, v), exact(q, k, v)
        assert found.shape == q.shape and found.dtype is dtype
        # bf16 outputs are rounded once: half a unit in the last place, and what rounded weights cost where they are
        assert error(found, wanted) < (1e-5 if dtype is torch.float32 else 2**-7 * float(wanted.abs().max()))


@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_bf16_is_as_near_to_plain_maths_as_torch_is(dim):
    q, k, v = inputs(600, 3, 2, dim, torch.bfloat16)
    wanted = exact(q, k, v)
    of_torch = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], is_causal=True, enable_gqa=True
    )[0].transpose(0, 1)
    ours, theirs = ((x.double() - wanted).square().mean() for x in (compiled(q, k, v), of_torch))
    assert ours < 1.02 * theirs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_knows_neither_what_follows_nor_the_threads(dtype):
    q, k, v = inputs(700, 3, 2, 64, dtype)
    before, whole = torch.get_num_threads(), compiled(q, k, v)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(compiled(q, k, v), whole)
            part = compiled(q[:391], k[:, :391], v[:, :391])  # strides of the whole
            assert torch.equal(part, whole[:391])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_neither_overflow_nor_blur(dtype):
    q, k, v = inputs(300, 2, 1, 64, dtype)
    found, wanted = compiled(100 * q, 100 * k, v), exact(100 * q, 100 * k, v)  # scores of some 10^5
    assert found.isfinite().all()
    assert error(found, wanted) < (2e-2 if dtype is torch.float32 else 5e-2)
    falling = torch.linspace(3e4, -3e4, 300)[None, :, None].expand(1, 300, 32).to(dtype)  # each key far below the first
    q = torch.ones(300, 1, 32, dtype=dtype)
    assert torch.equal(compiled(q, falling, v[:, :, :32])[:, 0], v[0, :1, :32].expand(300, -1))


def test_not_a_number_is_not_hidden():
    q, k, v = inputs(40, 2, 1, 32, torch.float32)
    k[0, 20] = torch.nan
    found = compiled(q, k, v)
    assert found[:20].isfinite().all() and found[20:].isnan().all()


def test_scratch_does_not_grow_with_the_prompt():
    from bdcli.backends.cpu.prompt.attention import scratch_bytes

    sizes = [scratch_bytes(dim, group) for dim in (32, 64, 96, 128) for group in (1, 3, 8, 32)]
    assert max(sizes) < 1 << 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_plain_twin_agrees(dtype):
    q, k, v = inputs(333, 3, 2, 64, dtype)
    torch.testing.assert_close(compiled(q, k, v), plain_attention(q, k, v, 0.125), atol=0.02, rtol=0.02)


def test_texts_side_by_side_are_attended_each_for_itself():
    q, k, v = randn(3, 50, 4, 32), randn(3, 50, 2, 32), randn(3, 50, 2, 32)
    found = attend_texts(q, k, v)
    for i in range(3):
        wanted = exact(q[i], k[i].transpose(0, 1), v[i].transpose(0, 1)).flatten(1)
        assert error(found[i], wanted) < 1e-5
    learned = attend_texts(q.requires_grad_(), k, v)
    assert learned.requires_grad and error(learned.detach(), found.double()) < 1e-5


def test_the_target_reads_its_prompt_with_it(monkeypatch):
    from bdcli.backends.cpu import caches

    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return compiled(*arguments)

    monkeypatch.setattr(caches.PanelFullCache, "causal_attention", staticmethod(counted))
    model = tiny_model(layers=3, heads=6, kv_heads=2, dim=32, hidden=64, inner=96)
    plain = tiny_model(layers=3, heads=6, kv_heads=2, dim=32, hidden=64, inner=96)
    from bdcli.cache.full import FullCache

    ours, theirs, ids = caches.PanelFullCache(model, 70), FullCache(plain, 70), [i * 7 % 41 for i in range(70)]
    model.prefill(ids, ours), plain.prefill(ids, theirs)
    assert len(calls) == 2  # the last layer stops at its keys and values
    keys = caches.key_panels(torch.nn.functional.pad(theirs.keys, (0, 0, 0, 26)))
    torch.testing.assert_close(ours.panel_keys, keys, atol=1e-4, rtol=1e-4)
