"""The operations a round is made of beyond torch's own, chosen by device in this one place.

Triton kernels on CUDA; elsewhere their plain twins (`bd_kernels.reference`), so that the program itself can be tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Ops:
    """Signatures and shapes as in the modules of `bd_kernels` of these names."""

    draft_attention: Callable
    verify_attention: Callable
    accept_greedy: Callable
    accept_sampled: Callable
    chunk_scores: Callable
    compact: Callable
    rotate_store: Callable
    add_norm: Callable
    gate: Callable


@cache
def ops_for(device_type: str) -> Ops:
    if device_type != "cuda":
        from bd_kernels import reference

        return Ops(**{name: getattr(reference, name) for name in Ops.__dataclass_fields__})
    from bd_kernels import accept, between, chunk_select, draft_attention, verify_attention

    return Ops(
        draft_attention.draft_attention,
        verify_attention.verify_attention,
        accept.accept_greedy,
        accept.accept_sampled,
        chunk_select.chunk_scores,
        chunk_select.compact,
        between.rotate_store,
        between.add_norm,
        between.gate,
    )
