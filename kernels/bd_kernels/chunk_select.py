"""Chunks of a prompt: scores, choice, and compaction into the drafter's prefix.

The choice itself is torch.topk: it sorts at most a few thousand scores a head, once per layer and prompt, beside a
prefill that reads the whole prompt; a kernel of ours could not be noticed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def score_kernel(
    QUERIES,  # [m, H, D] rotated to where they look from
    KEYS,  # [n, Hkv, D]
    COS,  # [CHUNK, D] rows a chunk's keys are rotated with (ROTATE)
    SIN,
    SCORES,  # [Hkv, chunks] fp32
    queries,  # m
    chunks,
    scale,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATE: tl.constexpr,
    KEEP_FIRST: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    kv_head = tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    real = dims < DIM
    rolled = (dims + DIM // 2) % DIM
    m = tl.arange(0, BLOCK_M)
    q_row = QUERIES + (m // GROUP).to(tl.int64) * q_stride_t + (kv_head * GROUP + m % GROUP) * q_stride_h
    inside = (m < queries * GROUP)[:, None] & real[None, :]
    q = tl.sum(tl.load(q_row[:, None] + dims[None, :], mask=inside, other=0.0).to(tl.float32), 0)
    q_rolled = tl.sum(tl.load(q_row[:, None] + rolled[None, :], mask=inside, other=0.0).to(tl.float32), 0)

    chunk = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    present = (chunk < chunks)[:, None] & real[None, :]
    score = tl.zeros([BLOCK_C], tl.float32)
    for j in tl.static_range(CHUNK):
        look = q
        if ROTATE:
            # q · rotate(k) = unrotate(q) · k, so that each key is read once and as it is
            cos = tl.load(COS + j * DIM + dims, mask=real, other=0.0).to(tl.float32)
            sin = tl.load(SIN + j * DIM + rolled, mask=real, other=0.0).to(tl.float32)
            look = q * cos + q_rolled * sin
        k_row = KEYS + (chunk * CHUNK + j).to(tl.int64) * k_stride_t + kv_head * k_stride_h
        k = tl.load(k_row[:, None] + dims[None, :], mask=present, other=0.0).to(tl.float32)
        score += tl.sum(k * look[None, :], 1)
    score *= scale / (queries * CHUNK)
    if KEEP_FIRST:
        score = tl.where(chunk == 0, float("inf"), score)
    tl.store(SCORES + kv_head * chunks + chunk, score, mask=chunk < chunks)


@triton.jit
def compact_kernel(
    KEYS,  # [n, Hkv, D]
    VALUES,
    INDEX,  # [Hkv, kept] positions
    COS,  # [kept, D] (ROTATE)
    SIN,
    KEPT_KEYS,  # [Hkv, kept, D]
    KEPT_VALUES,
    kept,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    kept_k_stride_h,
    kept_k_stride_s,
    kept_v_stride_h,
    kept_v_stride_s,
    ROTATE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    kv_head = tl.program_id(1)
    entry = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    inside = (entry < kept)[:, None] & (dims < DIM)[None, :]
    position = tl.load(INDEX + kv_head * kept + entry, mask=entry < kept, other=0).to(tl.int64)
    k_row = (KEYS + position * k_stride_t + kv_head * k_stride_h)[:, None]
    k = tl.load(k_row + dims[None, :], mask=inside, other=0.0)
    if ROTATE:  # x·cos + roll(x, D/2)·sin
        place = entry[:, None] * DIM + dims[None, :]
        cos = tl.load(COS + place, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(SIN + place, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(k_row + ((dims + DIM // 2) % DIM)[None, :], mask=inside, other=0.0).to(tl.float32)
        k = (k.to(tl.float32) * cos + other * sin).to(KEPT_KEYS.dtype.element_ty)
    v_row = (VALUES + position * v_stride_t + kv_head * v_stride_h)[:, None]
    v = tl.load(v_row + dims[None, :], mask=inside, other=0.0)
    kept_k = KEPT_KEYS + kv_head.to(tl.int64) * kept_k_stride_h + entry[:, None] * kept_k_stride_s + dims[None, :]
    kept_v = KEPT_VALUES + kv_head.to(tl.int64) * kept_v_stride_h + entry[:, None] * kept_v_stride_s + dims[None, :]
    tl.store(kept_k, k, mask=inside)
    tl.store(kept_v, v, mask=inside)


def score_constants(dim: int, group: int, queries: int, chunk: int, rotate: bool, keep_first: bool) -> dict:
    return {
        "GROUP": group,
        "CHUNK": chunk,
        "ROTATE": rotate,
        "KEEP_FIRST": keep_first,
        "DIM": dim,
        "BLOCK_D": triton.next_power_of_2(dim),
        "BLOCK_M": triton.next_power_of_2(queries * group),
        "BLOCK_C": 32,
    }


def compact_constants(dim: int, rotate: bool) -> dict:
    return {"ROTATE": rotate, "DIM": dim, "BLOCK_D": triton.next_power_of_2(dim), "BLOCK_N": 32}


def chunk_scores(queries: Tensor, keys: Tensor, chunk: int, *, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Scores fp32 [Hkv, C]: mean of the queries · mean key of the chunk / √D, summed over the group.

    queries [m, H, D], keys [C·chunk, Hkv, D], both rotated; or keys raw and rope = (cos, sin), each [chunk, D], for
    the places where a chunk's keys are scored as if standing.
    """
    return _scores(queries, keys, chunk, queries.shape[-1] ** -0.5, rope, False)


def official_scores(keys: Tensor, chunk: int) -> Tensor:
    """The paper's scores fp32 [Hkv, C] of rotated keys [n, Hkv, D]: last key · mean key, no scale, chunk 0 first."""
    return _scores(keys[-1:], keys[: keys.shape[0] // chunk * chunk], chunk, 1.0, None, True)


def _scores(queries, keys, chunk, scale, rope, keep_first) -> Tensor:
    kv_heads, dim = keys.shape[1:]
    chunks = keys.shape[0] // chunk
    assert keys.shape[0] == chunks * chunk and queries.stride(-1) == keys.stride(-1) == 1
    cos, sin = rope or (keys, keys)
    assert rope is None or (cos.is_contiguous() and sin.is_contiguous())
    scores = torch.empty(kv_heads, chunks, dtype=torch.float32, device=keys.device)
    group = queries.shape[1] // kv_heads
    constants = score_constants(dim, group, queries.shape[0], chunk, rope is not None, keep_first)
    score_kernel[(triton.cdiv(chunks, constants["BLOCK_C"]), kv_heads)](
        queries, keys, cos, sin, scores, queries.shape[0], chunks, scale,
        *queries.stride()[:2], *keys.stride()[:2], **constants,
    )  # fmt: skip
    return scores


def choose_chunks(scores: Tensor, count: int, chunk: int) -> Tensor:
    """Entry indices int32 [Hkv, count·chunk] of the best `count` chunks per head, in text order."""
    best = scores.topk(count, dim=1).indices.sort(dim=1).values
    entries = best[:, :, None] * chunk + torch.arange(chunk, device=scores.device)
    return entries.flatten(1).to(torch.int32)


def compact(
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    kept_keys: Tensor,
    kept_values: Tensor,
    *,
    rope: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Copy entries index [Hkv, K] int32 of keys and values [n, Hkv, D] to kept_keys and kept_values [Hkv, K, D].

    The kept tensors are slices of the cache. With rope = (cos, sin), each [K, D], keys come raw and are rotated.
    """
    (kv_heads, kept), dim = index.shape, keys.shape[-1]
    assert index.is_contiguous() and index.dtype is torch.int32
    assert all(x.stride(-1) == 1 for x in (keys, values, kept_keys, kept_values))
    cos, sin = rope or (keys, keys)
    assert rope is None or (cos.is_contiguous() and sin.is_contiguous())
    constants = compact_constants(dim, rope is not None)
    compact_kernel[(triton.cdiv(kept, constants["BLOCK_N"]), kv_heads)](
        keys, values, index, cos, sin, kept_keys, kept_values, kept,
        *keys.stride()[:2], *values.stride()[:2], *kept_keys.stride()[:2], *kept_values.stride()[:2], **constants,
    )  # fmt: skip
