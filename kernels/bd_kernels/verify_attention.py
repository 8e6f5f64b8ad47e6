"""Verify attention: the γ+1 new rows × the query heads of one KV head in one tile, so that the context is read once.

Cache layout: keys and values [N, Hkv, capacity, D], position p in slot p. The key axis is split over programs by the
length on the device, so that one captured graph serves every length; a second small kernel merges the splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bd_kernels.attend import LOG2_E, attend_tile, dot_type, merge, outputs, split_count, store_rows, tile_rows

TILE_ROWS = 128


@triton.jit
def verify_kernel(
    Q,  # [N, R, H, D]
    K,  # [N, Hkv, capacity, D]
    V,
    OUT,  # see store_rows
    LSE,
    LENGTH,  # [N] entries before the new rows
    scale,  # includes log2 e
    rows,
    q_stride_n,
    q_stride_r,
    k_stride_n,
    k_stride_h,
    k_stride_s,
    v_stride_n,
    v_stride_h,
    v_stride_s,
    GROUP: tl.constexpr,
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
    q_at = Q + n.to(tl.int64) * q_stride_n + (r * q_stride_r + head * DIM)[:, None] + dims[None, :]
    q = tl.load(q_at, mask=valid[:, None] & (dims < DIM)[None, :], other=0.0).to(DOT)

    length = tl.load(LENGTH + n).to(tl.int32)
    stop = length + rows
    share = tl.cdiv(tl.cdiv(stop, SPLITS), BLOCK_N) * BLOCK_N
    low = split * share
    high = tl.minimum(low + share, stop)
    # tiles that every row sees whole need no mask
    open_end = low + tl.maximum(tl.minimum(high, length + 1) - low, 0) // BLOCK_N * BLOCK_N

    keys = K + n.to(tl.int64) * k_stride_n + kv_head.to(tl.int64) * k_stride_h
    values = V + n.to(tl.int64) * v_stride_n + kv_head.to(tl.int64) * v_stride_h
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    lane = tl.arange(0, BLOCK_N)

    for start in range(low, open_end, BLOCK_N):
        peak, total, acc = attend_tile(
            q, keys, values, start + lane, lane, lane, k_stride_s, v_stride_s, scale, peak, total, acc,
            False, DIM, BLOCK_D, DOT,
        )  # fmt: skip
    for start in range(open_end, high, BLOCK_N):
        slots = start + lane
        stored = slots < stop
        seen = slots[None, :] <= (length + r)[:, None]
        peak, total, acc = attend_tile(
            q, keys, values, slots, stored, seen, k_stride_s, v_stride_s, scale, peak, total, acc,
            True, DIM, BLOCK_D, DOT,
        )  # fmt: skip

    row = (n * rows + r) * heads + head
    all_rows = tl.num_programs(2) * rows * heads
    store_rows(OUT, LSE, row, valid, split, all_rows, peak, total, acc, SPLITS, DIM, BLOCK_D)


def verify_constants(dim: int, group: int, rows: int, dtype: torch.dtype, splits: int) -> tuple[dict, dict]:
    """Compile-time constants and launch options of `verify_kernel`."""
    block_d, block_m = triton.next_power_of_2(dim), tile_rows(rows, group, TILE_ROWS)
    block_n = 128 if block_d == 64 and block_m <= 32 else 64  # 16 KiB of keys a tile, where registers allow
    constants = {
        "GROUP": group,
        "SPLITS": splits,
        "DIM": dim,
        "BLOCK_D": block_d,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n // 2 if dtype is torch.float32 else block_n,
        "DOT": dot_type(dtype),
    }
    wide = block_m * block_d >= 4096  # with 4 warps ptxas spills a little there (sm_80)
    return constants, {"num_warps": 8 if wide else 4, "num_stages": 3}


def verify_attention(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor, *, splits: int | None = None, out: Tensor | None = None
) -> Tensor:
    """Output [N, R, H, D] of new rows q [N, R, H, D] over k and v [N, Hkv, capacity, D].

    length [N] integers on the device: entries before the new rows, whose own entries stand in slots length[n] ..
    length[n] + R - 1 already. Row r sees slots 0 .. length[n] + r. `splits` is fixed by the capacity, not the length.
    """
    n, rows, heads, dim = q.shape
    kv_heads, capacity = k.shape[1:3]
    assert q.stride(-1) == 1 and q.stride(-2) == dim, "heads of a query must be contiguous"
    assert k.stride(-1) == v.stride(-1) == 1
    group = heads // kv_heads
    row_tiles = triton.cdiv(rows * group, tile_rows(rows, group, TILE_ROWS))
    if splits is None:
        splits = split_count(row_tiles * kv_heads * n, capacity // 256, q.device)
        if tile_rows(rows, group, TILE_ROWS) >= 64:  # without splits ptxas spills a little there (sm_100)
            splits = max(2, splits)
    out, written, lse = outputs(q, splits, out)
    constants, options = verify_constants(dim, group, rows, q.dtype, splits)
    verify_kernel[(splits * row_tiles, kv_heads, n)](
        q, k, v, written, lse, length, dim**-0.5 * LOG2_E, rows,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        **constants, **options,
    )  # fmt: skip
    if splits > 1:
        merge(written, lse, out)
    return out
