"""Memory on large pages, where the system gives them when asked: what is streamed each step needs few page walks.
And memory that is given back once a prompt is read."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from bdcli.model.llama import Layer, Model
from bdcli.model.quantised import QuantisedMatrix, Weight, nbytes

HUGE_PAGE, MADV_DONTNEED, MADV_HUGEPAGE = 2 << 20, 4, 14  # Linux
LINE = 64  # bytes of a cache line, where each weight begins
MATRICES_AND_VECTORS = ("embedding", "norm", "head", *Layer.__slots__)
_moved_already = WeakIdKeyDictionary()  # weights that lie there, by identity


def huge_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros [shape]; from half a large page on they start at a multiple of one."""
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE_PAGE // 2:
        return torch.zeros(shape, dtype=dtype)
    memory = torch.empty(size + HUGE_PAGE, dtype=torch.uint8)
    first = -memory.data_ptr() % HUGE_PAGE
    whole = memory[first : first + size]
    advised = ctypes.c_size_t(size // HUGE_PAGE * HUGE_PAGE)  # the rest is not worth a large page
    ctypes.CDLL(None).madvise(ctypes.c_void_p(whole.data_ptr()), advised, MADV_HUGEPAGE)
    return whole.zero_().view(dtype).view(shape)  # the advice is a wish: refused, these are ordinary pages


def move_to_huge_pages(models: list[Model]) -> None:
    """Move the weights of models side by side onto large pages, once. Nothing changes but where they lie.

    What models share they share afterwards.
    """
    owners = [owner for model in models for owner in (model, *model.layers)]
    names = [(owner, name) for owner in owners for name in MATRICES_AND_VECTORS if hasattr(owner, name)]
    found = (getattr(owner, name) for owner, name in names)
    weights = {id(w): w for w in found if w is not None and w not in _moved_already}
    memory, at = huge_zeros((sum(map(_lines, weights.values())),), torch.uint8), 0
    moved = {}
    for key, weight in weights.items():
        moved[key] = _moved(weight, memory[at : at + _lines(weight)])
        _moved_already[moved[key]] = True
        at += _lines(weight)
    for owner, name in names:
        old = getattr(owner, name)
        if id(old) in weights:
            setattr(owner, name, moved[id(old)])


def _lines(weight: Weight) -> int:
    """Bytes of a weight in whole cache lines."""
    return -(-nbytes(weight) // LINE) * LINE


def _moved(weight: Weight, memory: Tensor) -> Weight:
    if isinstance(weight, QuantisedMatrix):
        return replace(weight, data=_moved(weight.data, memory))
    return memory[: nbytes(weight)].view(weight.dtype).view(weight.shape).copy_(weight)


def give_back() -> None:
    """Return to the system what reading a prompt took and decoding does without (Linux).

    That is free heap, and the resident pages of libraries' files: of torch's and LLVM's 200 MB compiled steps use next
    to nothing. Only mappings that are not writable and hold no page of their own are dropped, so a page that is touched
    again is read from its file.
    """
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    first = stop = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *words = line.split()
        if not name.endswith(":"):  # a mapping begins: addresses, rights, offset, device, inode, path
            of_file = len(words) > 4 and words[4].startswith("/") and words[0][1] == "-"
            first, stop = (int(a, 16) for a in name.split("-")) if of_file else (0, 0)
        elif name == "Anonymous:" and words[0] == "0" and stop:
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(stop - first), MADV_DONTNEED)
