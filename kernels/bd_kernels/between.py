"""What stands between the matrix products of a decoder layer, one kernel each: rotate and store, add and norm, gate.

A decode step has few rows, so that these cost launches and latency, not bandwidth; torch needs some twelve for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rotate_store_kernel(
    QK,  # [T, H+Hkv, D] unrotated
    V,  # [T, Hkv, D]
    Q,  # [T, H, D] queries out (ROTATE_Q)
    KEYS,  # [Hkv, slots, D]
    VALUES,
    POSITION,  # [T] rows of COS and SIN
    SLOT,  # [T]
    COS,  # [positions, D]
    SIN,
    heads,
    qk_stride,
    v_stride,
    k_stride_h,
    k_stride_s,
    v_stride_h,
    v_stride_s,
    ROTATE_Q: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)  # a query head, if they are rotated here, or a key head with its values
    if not ROTATE_Q:
        head += heads
    dims = tl.arange(0, BLOCK_D)
    inside = dims < DIM
    table = tl.load(POSITION + t) * DIM + dims
    cos = tl.load(COS + table, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(SIN + table, mask=inside, other=0.0).to(tl.float32)
    row = QK + t * qk_stride + head * DIM
    x = tl.load(row + dims, mask=inside, other=0.0).to(tl.float32)
    rolled = tl.load(row + (dims + DIM // 2) % DIM, mask=inside, other=0.0).to(tl.float32)
    x = (x * cos + rolled * sin).to(QK.dtype.element_ty)
    if head < heads:
        tl.store(Q + (t * heads + head) * DIM + dims, x, mask=inside)
    else:
        slot, kv_head = tl.load(SLOT + t), (head - heads).to(tl.int64)
        v = tl.load(V + t * v_stride + kv_head * DIM + dims, mask=inside, other=0.0)
        tl.store(KEYS + kv_head * k_stride_h + slot * k_stride_s + dims, x, mask=inside)
        tl.store(VALUES + kv_head * v_stride_h + slot * v_stride_s + dims, v, mask=inside)


@triton.jit
def add_norm_kernel(
    X,  # [T, E] residual stream, becomes x + y
    Y,  # [T, E]
    WEIGHT,  # [E]
    OUT,  # [T, E]
    width,
    eps,
    BLOCK_E: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * width + tl.arange(0, BLOCK_E)
    inside = tl.arange(0, BLOCK_E) < width
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32) + tl.load(Y + at, mask=inside, other=0.0).to(tl.float32)
    x = x.to(X.dtype.element_ty)
    tl.store(X + at, x, mask=inside)
    x = x.to(tl.float32)  # the stream as it is kept
    scale = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    weight = tl.load(WEIGHT + tl.arange(0, BLOCK_E), mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + at, (x * scale * weight).to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def gate_kernel(
    GATE_UP,  # [T, 2·I]
    OUT,  # [T, I]
    inner,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < inner
    gate = tl.load(GATE_UP + t * 2 * inner + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(GATE_UP + t * 2 * inner + inner + i, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(OUT + t * inner + i, out.to(OUT.dtype.element_ty), mask=inside)


def rotate_constants(dim: int, rotate_q: bool) -> tuple[dict, dict]:
    """Compile-time constants and launch options of `rotate_store_kernel`."""
    return {"ROTATE_Q": rotate_q, "DIM": dim, "BLOCK_D": triton.next_power_of_2(dim)}, {"num_warps": 1}


def norm_constants(width: int) -> tuple[dict, dict]:
    return {"BLOCK_E": triton.next_power_of_2(width)}, {"num_warps": 8 if width > 1024 else 4}


def gate_constants() -> tuple[dict, dict]:
    return {"BLOCK": 1024}, {"num_warps": 4}


def rotate_store(
    qk: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    slots: Tensor,
    rope: tuple[Tensor, Tensor],
    rotate_q: bool,
) -> Tensor:
    """Rotate rows qk [T, H+Hkv, D] to `positions`, put keys and v [T, Hkv, D] into `slots`; queries [T, H, D].

    keys and values [Hkv, slots, D]; positions and slots [T] int64; rope = (cos, sin), each [positions, D] in the form
    of `bdcli.model.rope.RopeTable`. Without rotate_q the queries come back as they are.
    """
    rows, both, dim = qk.shape
    kv_heads = v.shape[1]
    heads = both - kv_heads
    assert qk.stride()[1:] == v.stride()[1:] == (dim, 1), "heads of a row must be contiguous"
    assert keys.stride(-1) == values.stride(-1) == 1 and all(x.is_contiguous() for x in rope)
    q = torch.empty(rows, heads, dim, dtype=qk.dtype, device=qk.device) if rotate_q else qk[:, :heads]
    constants, options = rotate_constants(dim, rotate_q)
    rotate_store_kernel[(rows, both if rotate_q else kv_heads)](
        qk, v, q, keys, values, positions, slots, *rope, heads, qk.stride(0), v.stride(0),
        *keys.stride()[:2], *values.stride()[:2], **constants, **options,
    )  # fmt: skip
    return q


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, E] += y in place; RMS norm of the sum times weight [E]."""
    assert x.is_contiguous() and y.is_contiguous()
    out = torch.empty_like(x)
    constants, options = norm_constants(x.shape[1])
    add_norm_kernel[(x.shape[0],)](x, y, weight, out, x.shape[1], eps, **constants, **options)
    return out


def gate(gate_up: Tensor) -> Tensor:
    """silu(g)·u [T, I] of rows [g | u] [T, 2·I]."""
    rows, width = gate_up.shape
    assert gate_up.is_contiguous()
    out = torch.empty(rows, width // 2, dtype=gate_up.dtype, device=gate_up.device)
    constants, options = gate_constants()
    gate_kernel[(rows, triton.cdiv(width // 2, constants["BLOCK"]))](gate_up, out, width // 2, **constants, **options)
    return out
