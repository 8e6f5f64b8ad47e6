"""Causal attention over a whole prompt in torch: what a full cache reads its prompt with.

`bdcli.backends.cpu.prompt.attention` is the same for processors, compiled; where that cannot run, torch's own kernel is
much faster than an online softmax in torch operations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bdcli.base.devices import product_dtype


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention [T, H, D] of queries q [T, H, D] over keys and values [Hkv, T, D], each of its past.

    bf16 is computed in fp32 where the processor multiplies that faster, one KV head per thread at a time, so that few
    fp32 copies are alive together.
    """
    dtype = product_dtype(q.device.type) if q.dtype is torch.bfloat16 else q.dtype
    heads_at_once = k.shape[0] if dtype is q.dtype else torch.get_num_threads()
    group, out = q.shape[1] // k.shape[0], q.new_empty(q.shape)
    for first in range(0, k.shape[0], heads_at_once):
        query_heads = slice(first * group, (first + heads_at_once) * group)
        keys, values = (x[first : first + heads_at_once] for x in (k, v))
        inputs = (x[None].to(dtype) for x in (q[:, query_heads].transpose(0, 1), keys, values))
        read = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=scale, enable_gqa=group > 1)[0]
        out[:, query_heads] = read.transpose(0, 1)
    return out
