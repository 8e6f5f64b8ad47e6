"""Causal attention of whole texts outside of any cache, with whatever is fastest: training and preparation use it."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from bdcli.backends.cpu.machine import support


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention [N, T, H·D] of N texts, q [N, T, H, D], k and v [N, T, Hkv, D]; each query sees its past.

    Compiled on processors where no gradient is asked for, torch's own elsewhere.
    """
    texts, length, heads, dim = q.shape
    if _can_compile(q, k, v):
        from bdcli.backends.cpu.prompt.attention import causal_attention as compiled

        rows = [compiled(q[i], k[i].transpose(0, 1), v[i].transpose(0, 1), dim**-0.5) for i in range(texts)]
        out = torch.stack(rows) if texts > 1 else rows[0]
        return out.view(texts, length, -1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != k.shape[1])
    return out.transpose(1, 2).reshape(texts, length, -1)


def _can_compile(q: Tensor, k: Tensor, v: Tensor) -> bool:
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    fits = q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16) and q.shape[-1] % 32 == 0
    return fits and not learns and not torch.compiler.is_compiling() and _processor_fits()


@functools.cache
def _processor_fits() -> bool:
    return support.processor_obstacle() is None
