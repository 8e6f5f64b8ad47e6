"""Memory on large pages, where the system gives them when asked: what is streamed each step needs few page walks."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from bdcli.model import Layer, Model

PAGE, HUGE_PAGE, MADV_HUGEPAGE = 4096, 2 << 20, 14  # Linux


def huge_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros [shape]; from half a large page on they start at a multiple of one."""
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE_PAGE // 2:
        return torch.zeros(shape, dtype=dtype)
    memory = torch.empty(-(-size // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE, dtype=torch.uint8)
    first = -memory.data_ptr() % HUGE_PAGE
    whole = memory[first : first + -(-size // HUGE_PAGE) * HUGE_PAGE]
    ctypes.CDLL(None).madvise(ctypes.c_void_p(whole.data_ptr()), ctypes.c_size_t(len(whole)), MADV_HUGEPAGE)
    return whole[:size].zero_().view(dtype).view(shape)  # the advice is a wish: refused, these are ordinary pages


def settle(model: Model) -> None:
    """Move the weights of `model` side by side onto large pages. Nothing changes but where they lie."""
    names = [(layer, name) for layer in model.layers for name in Layer.__slots__]
    tied = model.head is model.embedding
    names += [(model, "embedding"), (model, "norm"), *([] if tied else [(model, "head")])]
    names = [(owner, name) for owner, name in names if getattr(owner, name) is not None]
    sizes = [-(-getattr(owner, name).numel() // 32) * 32 for owner, name in names]
    memory, at = huge_zeros((sum(sizes),), model.dtype), 0
    for (owner, name), size in zip(names, sizes):
        old = getattr(owner, name)
        new = memory[at : at + old.numel()].view(old.shape)
        setattr(owner, name, new.copy_(old))
        at += size
    if tied:
        model.head = model.embedding
