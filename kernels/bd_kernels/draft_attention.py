"""Budgeted draft attention: few query rows over the drafter's cache in place, under a view of `bdcli.cache.view`.

Cache layout: keys and values [N, Hkv, slots, D], D contiguous. Slots 0..sinks-1 hold the sinks; then the chosen
chunks, either compacted behind them or anywhere in the buffer by an index list; from `ring_start` on the ring, where
position p sits in slot p mod ring. One softmax over all; nothing is moved, and no unseen slot is read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bd_kernels.attend import LOG2_E, attend_tile, dot_type, merge, outputs, split_count, store_rows, tile_rows

TILE_ROWS = 32  # two rotated queries in registers; a draft step rarely has more, and then KV comes from L2
SPLIT_ENTRIES = 512  # of one split, so that a small budget needs no merge; a guess until measured on a GPU


@triton.jit
def _rotated(rows, place, COS, SIN, inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """x·cos + roll(x, D/2)·sin in fp32 for x [M, D] at pointers rows [M], with rows place [M] of the tables."""
    dims = tl.arange(0, BLOCK_D)
    x = tl.load(rows[:, None] + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    rolled = tl.load(rows[:, None] + ((dims + DIM // 2) % DIM)[None, :], mask=inside, other=0.0).to(tl.float32)
    table = place[:, None] * DIM + dims[None, :]
    cos = tl.load(COS + table, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(SIN + table, mask=inside, other=0.0).to(tl.float32)
    return x * cos + rolled * sin


@triton.jit
def draft_kernel(
    Q,  # [N, R, H, D]; rotated to its position, or raw
    Q_RANK,  # like Q, rotated to its rank (QUERY == "two")
    K,  # [N, Hkv, slots, D]
    V,
    OUT,  # see store_rows
    LSE,
    POSITION,  # [N] position of the first query row
    INDEX,  # [N, Hkv, chosen] slots of the chosen entries (INDEXED)
    COS,  # [positions, D] (QUERY == "raw")
    SIN,
    scale,  # includes log2 e
    rows,
    sinks,
    chosen,
    window,
    ring,
    ring_start,
    q_stride_n,
    q_stride_r,
    rank_stride_n,
    rank_stride_r,
    k_stride_n,
    k_stride_h,
    k_stride_s,
    v_stride_n,
    v_stride_h,
    v_stride_s,
    GROUP: tl.constexpr,
    QUERY: tl.constexpr,
    INDEXED: tl.constexpr,
    SPLITS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
):
    # neighbours share the keys of one split
    row_tiles = tl.cdiv(rows * GROUP, BLOCK_M)
    split = tl.program_id(0) // row_tiles
    kv_head = tl.program_id(1)
    n = tl.program_id(2)
    heads = tl.num_programs(1) * GROUP
    m = (tl.program_id(0) % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = m // GROUP
    head = kv_head * GROUP + m % GROUP
    valid = m < rows * GROUP
    dims = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (dims < DIM)[None, :]

    first = tl.load(POSITION + n).to(tl.int32)
    at = first + r
    newest = first + rows - 1

    q_row = Q + n.to(tl.int64) * q_stride_n + r * q_stride_r + head * DIM
    if QUERY == "raw":
        q = _rotated(q_row, at, COS, SIN, inside, DIM, BLOCK_D).to(DOT)
        rank = tl.minimum(at, sinks + chosen + window - 1)
        q_rank = _rotated(q_row, rank, COS, SIN, inside, DIM, BLOCK_D).to(DOT)
    else:
        q = tl.load(q_row[:, None] + dims[None, :], mask=inside, other=0.0).to(DOT)
        q_rank = q
        if QUERY == "two":
            rank_row = Q_RANK + n.to(tl.int64) * rank_stride_n + r * rank_stride_r + head * DIM
            q_rank = tl.load(rank_row[:, None] + dims[None, :], mask=inside, other=0.0).to(DOT)

    keys = K + n.to(tl.int64) * k_stride_n + kv_head.to(tl.int64) * k_stride_h
    values = V + n.to(tl.int64) * v_stride_n + kv_head.to(tl.int64) * v_stride_h
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    lane = tl.arange(0, BLOCK_N)

    prefix_tiles = tl.cdiv(sinks + chosen, BLOCK_N)
    tiles = prefix_tiles + tl.cdiv(ring, BLOCK_N)
    share = tl.cdiv(tiles, SPLITS)
    low = split * share
    high = tl.minimum(low + share, tiles)

    for i in range(low, tl.minimum(high, prefix_tiles)):
        entry = i * BLOCK_N + lane
        picked = entry >= sinks  # chosen entries are seen by all; a young sequence may lack sinks
        stored = (entry < sinks + chosen) & (picked | (entry <= newest))
        slots = entry
        if INDEXED:
            index_at = INDEX + (n * tl.num_programs(1) + kv_head) * chosen + entry - sinks
            slots = tl.where(picked, tl.load(index_at, mask=stored & picked, other=0), entry)
        seen = stored[None, :] & (picked[None, :] | (entry[None, :] <= at[:, None]))
        peak, total, acc = attend_tile(
            q_rank, keys, values, slots, stored, seen, k_stride_s, v_stride_s, scale, peak, total, acc,
            True, DIM, BLOCK_D, DOT,
        )  # fmt: skip

    for i in range(tl.maximum(low, prefix_tiles), high):
        slot = (i - prefix_tiles) * BLOCK_N + lane
        held = newest - (newest - slot + ring) % ring  # the largest position <= newest that belongs in this slot
        stored = (slot < ring) & (held >= sinks) & (held > first - window)
        seen = stored[None, :] & (held[None, :] <= at[:, None]) & (held[None, :] > at[:, None] - window)
        peak, total, acc = attend_tile(
            q, keys, values, ring_start + slot, stored, seen, k_stride_s, v_stride_s, scale, peak, total, acc,
            True, DIM, BLOCK_D, DOT,
        )  # fmt: skip

    row = (n * rows + r) * heads + head
    all_rows = tl.num_programs(2) * rows * heads
    store_rows(OUT, LSE, row, valid, split, all_rows, peak, total, acc, SPLITS, DIM, BLOCK_D)


def draft_constants(
    dim: int, group: int, rows: int, dtype: torch.dtype, query: str, indexed: bool, splits: int
) -> tuple[dict, dict]:
    """Compile-time constants and launch options of `draft_kernel`."""
    block_d, block_m = triton.next_power_of_2(dim), tile_rows(rows, group, TILE_ROWS)
    wide = block_m > 16 and block_d == 64  # with 64 entries ptxas spills a little there (sm_80, sm_100)
    constants = {
        "GROUP": group,
        "QUERY": query,
        "INDEXED": indexed,
        "SPLITS": splits,
        "DIM": dim,
        "BLOCK_D": block_d,
        "BLOCK_M": block_m,
        "BLOCK_N": 32 if wide or dtype is torch.float32 else 64,
        "DOT": dot_type(dtype),
    }
    return constants, {"num_warps": 4, "num_stages": 3}


def draft_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    sinks: int,
    chosen: int,
    window: int,
    ring: int,
    *,
    q_rank: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    index: Tensor | None = None,
    ring_start: int | None = None,
    splits: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Output [N, R, H, D] of query rows q [N, R, H, D] at positions position[n] .. position[n] + R - 1.

    k and v [N, Hkv, slots, D] already hold the rows' own entries; position [N] integers on the device. Rebased
    positions: either q and q_rank come rotated, to position and to rank, or q is raw and rope = (cos, sin), each
    [positions, D] in the form of `bdcli.model.rope.RopeTable`. index [N, Hkv, chosen] int32 names the slots of chosen
    entries that are not compacted; then ring_start says where the ring is.
    """
    n, rows, heads, dim = q.shape
    kv_heads = k.shape[1]
    query = "raw" if rope is not None else "two" if q_rank is not None else "one"
    q_rank = q if q_rank is None else q_rank
    cos, sin = rope or (q, q)
    for x in (q, q_rank):
        assert x.stride(-1) == 1 and x.stride(-2) == dim, "heads of a query must be contiguous"
    assert k.stride(-1) == v.stride(-1) == 1 and cos.stride(-1) == sin.stride(-1) == 1
    assert index is None or (index.dtype is torch.int32 and index.is_contiguous() and ring_start is not None)
    assert rope is None or (cos.is_contiguous() and sin.is_contiguous())
    group = heads // kv_heads
    row_tiles = triton.cdiv(rows * group, tile_rows(rows, group, TILE_ROWS))
    if splits is None:
        splits = split_count(row_tiles * kv_heads * n, (sinks + chosen + ring) // SPLIT_ENTRIES, q.device)
    out, written, lse = outputs(q, splits, out)
    constants, options = draft_constants(dim, group, rows, q.dtype, query, index is not None, splits)
    draft_kernel[(splits * row_tiles, kv_heads, n)](
        q, q_rank, k, v, written, lse, position, position if index is None else index, cos, sin,
        dim**-0.5 * LOG2_E, rows, sinks, chosen, window, ring, sinks + chosen if ring_start is None else ring_start,
        *q.stride()[:2], *q_rank.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        **constants, **options,
    )  # fmt: skip
    if splits > 1:
        merge(written, lse, out)
    return out
