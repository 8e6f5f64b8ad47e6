"""What both attention kernels share: one step of the online softmax, and the merge of splits.

Scores are kept in units of log2, because the GPU has exp2. A tile is M rows (queries × the group's heads) by N keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

LOG2_E = 1.4426950408889634
DOT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def attend_tile(
    q,  # [M, D] in DOT
    keys,  # pointer to slot 0 of this sequence and KV head
    values,
    slots,  # [N] cache slots of the tile's entries
    stored,  # [N] may be loaded; the rest of memory is never read, it may hold anything
    seen,  # [M, N] query may see
    key_stride,
    value_stride,
    scale,  # includes log2 e
    peak,  # [M] largest score so far
    total,  # [M] sum of weights so far
    acc,  # [M, D] weighted values so far
    MASKED: tl.constexpr,  # False: every entry is stored and seen
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    dims = tl.arange(0, BLOCK_D)
    key_at = keys + slots[:, None] * key_stride + dims[None, :]
    value_at = values + slots[:, None] * value_stride + dims[None, :]
    if MASKED or DIM < BLOCK_D:
        inside = (dims < DIM)[None, :]
        if MASKED:
            inside = inside & stored[:, None]
        k = tl.load(key_at, mask=inside, other=0.0).to(DOT)
        v = tl.load(value_at, mask=inside, other=0.0).to(DOT)
    else:
        k = tl.load(key_at).to(DOT)
        v = tl.load(value_at).to(DOT)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen nothing yet: no inf - inf
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(DOT), v, acc * shrink[:, None], input_precision="ieee")
    return new_peak, total, acc


@triton.jit
def store_rows(
    OUT,  # [N, R, H, D] output, or with splits [S, N, R, H, D] fp32 partial outputs
    LSE,  # with splits [S, N, R, H] fp32 log2 of the sum of weights
    row,  # [M] index into the flattened (N, R, H)
    valid,  # [M]
    split,
    all_rows,  # N·R·H
    peak,
    total,
    acc,
    SPLITS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dims = tl.arange(0, BLOCK_D)
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if SPLITS > 1:
        row = row + split * all_rows
        tl.store(LSE + row, peak + tl.log2(total), mask=valid)
    at = OUT + row.to(tl.int64)[:, None] * DIM + dims[None, :]
    tl.store(at, out.to(OUT.dtype.element_ty), mask=valid[:, None] & (dims < DIM)[None, :])


@triton.jit
def merge_kernel(
    PART,  # [S, rows, D] fp32
    LSE,  # [S, rows] fp32, -inf where a split saw nothing
    OUT,  # [rows, D]
    rows,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    dims = tl.arange(0, BLOCK_D)
    lse = tl.load(LSE + split * rows + row, mask=split < SPLITS, other=float("-inf"))
    inside = (split < SPLITS)[:, None] & (dims < DIM)[None, :]
    part = tl.load(PART + (split[:, None] * rows + row) * DIM + dims[None, :], mask=inside, other=0.0)
    weights = tl.exp2(lse - tl.max(lse, 0))  # every query sees at least itself, so the maximum is finite
    out = tl.sum(part * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(OUT + row * DIM + dims, out.to(OUT.dtype.element_ty), mask=dims < DIM)


# The interpreter computes bf16 on its raw bits; there, everything is upcast right after the load.
INTERPRETED = not isinstance(merge_kernel, JITFunction)


def dot_type(dtype: torch.dtype):
    """Type of the operands of tl.dot."""
    return tl.float32 if INTERPRETED else DOT_TYPES[dtype]


def tile_rows(rows: int, group: int, limit: int) -> int:
    """M: rows of one tile, at most `limit`. With more of them KV is read again, from L2."""
    return min(limit, max(16, triton.next_power_of_2(rows * group)))


def merge(part: Tensor, lse: Tensor, out: Tensor) -> None:
    """part [S, rows, D] and lse [S, rows] of S splits into out [..., D]."""
    splits, rows, dim = part.shape
    merge_kernel[(rows,)](part, lse, out, rows, **merge_constants(splits, dim))


def merge_constants(splits: int, dim: int) -> dict:
    return {
        "SPLITS": splits,
        "BLOCK_S": triton.next_power_of_2(splits),
        "DIM": dim,
        "BLOCK_D": triton.next_power_of_2(dim),
    }


def split_count(programs: int, tiles: int, device: torch.device) -> int:
    """Splits of the key axis that give each processor about two programs, of at least one tile each."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(2 * processors // programs, tiles, 64))


def outputs(q: Tensor, splits: int, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(result [N, R, H, D], what the kernel writes, log-sums): the result itself unless there are splits to merge."""
    n, rows, heads, dim = q.shape
    if out is None:
        out = torch.empty(n, rows, heads, dim, dtype=q.dtype, device=q.device)
    if splits == 1:
        return out, out, out
    part = torch.empty(splits, n * rows * heads, dim, dtype=torch.float32, device=q.device)
    return out, part, torch.empty(splits, n * rows * heads, dtype=torch.float32, device=q.device)
