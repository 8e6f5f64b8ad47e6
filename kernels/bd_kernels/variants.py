"""The one table of variants: the cases that tests run and the kernels, types and constants that compile for them.

Cases are plain values; triton is imported only when one is turned into what it compiles to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

import torch

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
POINTERS = {F16: "*fp16", BF16: "*bf16", F32: "*fp32"}


class DraftCase(NamedTuple):
    """query: "one" (absolute), "two" (rotated twice by the caller), "raw" (rotated in the kernel)."""

    dim: int
    group: int
    rows: int
    dtype: torch.dtype
    query: str
    indexed: bool
    splits: int


class VerifyCase(NamedTuple):
    dim: int
    group: int
    rows: int
    dtype: torch.dtype
    splits: int


class ChunkCase(NamedTuple):
    dim: int
    group: int
    dtype: torch.dtype
    rotate: bool


class LayerCase(NamedTuple):
    """What stands between a layer's products: head dimension, width of the residual stream and of the MLP."""

    dim: int
    width: int
    inner: int
    dtype: torch.dtype
    rotate_q: bool


class LossCase(NamedTuple):
    kind: str
    dtype: torch.dtype


class AcceptCase(NamedTuple):
    """γ = 0 is also how a draft token is chosen; then nothing is committed."""

    gamma: int
    vocab: int
    dtype: torch.dtype  # of the target's logits; probabilities are fp32


USUAL = 3  # the first cases of each list; the rest cross what is left, and tests mark them slow

DRAFT = [
    DraftCase(64, 1, 1, BF16, "raw", False, 1),  # llama-68m
    DraftCase(128, 4, 1, BF16, "one", True, 3),
    DraftCase(96, 2, 18, F16, "two", False, 2),
    DraftCase(128, 8, 18, BF16, "raw", True, 1),
    DraftCase(64, 3, 5, F16, "one", False, 1),
    DraftCase(64, 4, 2, BF16, "two", True, 4),
    DraftCase(96, 1, 3, BF16, "raw", True, 2),
    DraftCase(128, 8, 1, F16, "raw", False, 1),
    DraftCase(64, 4, 8, BF16, "two", False, 2),
    DraftCase(128, 4, 8, BF16, "one", False, 2),
]
VERIFY = [
    VerifyCase(128, 1, 8, BF16, 8),  # Llama-2-7B
    VerifyCase(128, 4, 17, BF16, 8),  # Llama-3-8B
    VerifyCase(64, 3, 1, F16, 1),
    VerifyCase(96, 8, 17, F16, 5),
    VerifyCase(64, 1, 17, BF16, 3),
    VerifyCase(128, 8, 4, F16, 2),
    VerifyCase(64, 4, 16, BF16, 4),
    VerifyCase(64, 8, 16, BF16, 4),
    VerifyCase(128, 4, 16, BF16, 4),
    VerifyCase(128, 1, 1, BF16, 8),
    VerifyCase(128, 8, 2, F16, 64),
]
CHUNKS = [ChunkCase(64, 1, BF16, True), ChunkCase(96, 3, F16, False), ChunkCase(128, 4, BF16, True)]
LAYERS = [
    LayerCase(64, 768, 3072, BF16, False),  # llama-68m
    LayerCase(128, 4096, 11008, BF16, True),  # Llama-2-7B
    LayerCase(96, 200, 344, F16, True),
    LayerCase(64, 5120, 13824, F16, False),
]
LOSSES = [LossCase(kind, dtype) for dtype in (BF16, F16) for kind in ("ce", "kl", "log_alpha", "lk")]
ACCEPTS = [
    AcceptCase(4, 5000, BF16),
    AcceptCase(16, 97, F32),
    AcceptCase(0, 2500, F32),
    AcceptCase(1, 4096, F16),
    AcceptCase(7, 128256, F32),
    AcceptCase(16, 128256, F32),
]


# What the engine launches beside these, for every head dimension, type and size of a tile: compiled, too many to run
# in an interpreter. (group, rows) give the tiles of 16, 32, 64 and 128 rows.
SIZES, DIMS, LOW = [(1, 1), (8, 4), (4, 16), (8, 16)], (64, 96, 128), (BF16, F16)
ENGINE_DRAFT = [
    DraftCase(dim, *size, dtype, query, False, splits)
    for dim, dtype, size, query, splits in product(DIMS, LOW, SIZES[:2], ("raw", "one"), (1, 4))
]
ENGINE_VERIFY = [
    VerifyCase(dim, *size, dtype, splits)
    for dim, dtype, size, splits in product(DIMS, LOW, SIZES, (1, 16))
    if splits > 1 or size in SIZES[:2]
]


@dataclass(frozen=True)
class Compiled:
    """One compilation. `types` maps run-time arguments to triton types, or to 1: such an integer is specialised."""

    name: str
    kernel: object
    types: dict
    constants: dict
    options: dict = field(default_factory=dict)
    dot: bool = False


def table(usual: bool = False) -> list[Compiled]:
    """All there is to compile, or what the usual cases need; equal compilations appear once."""
    found = [c for make, cases in _MAKERS for case in cases[: USUAL if usual else None] for c in make(case)]
    return list({str((c.kernel, c.types, c.constants, c.options)): c for c in found}.values())


def _types(kernel, constants: dict, **types) -> dict:
    """Arguments that are not named: strides and sizes, int32."""
    names = [name for name in kernel.arg_names if name not in constants]
    assert set(types) <= set(names), set(types) - set(names)
    return {name: types.get(name, "i32") for name in names}


def _merged(name: str, splits: int, dim: int, out: str) -> list[Compiled]:
    from bd_kernels.attend import merge_constants, merge_kernel

    if splits == 1:
        return []
    constants = merge_constants(splits, dim)
    types = _types(merge_kernel, constants, PART="*fp32", LSE="*fp32", OUT=out)
    return [Compiled(f"{name} merge", merge_kernel, types, constants)]


def _draft(case: DraftCase) -> list[Compiled]:
    from bd_kernels.draft_attention import draft_constants, draft_kernel

    x = POINTERS[case.dtype]
    out = x if case.splits == 1 else "*fp32"
    constants, options = draft_constants(*case[:3], case.dtype, case.query, case.indexed, case.splits)
    types = _types(
        draft_kernel, constants, Q=x, Q_RANK=x, K=x, V=x, OUT=out, LSE=out, POSITION="*i64", COS=x, SIN=x,
        INDEX="*i32" if case.indexed else "*i64", scale="fp32", rows=1 if case.rows == 1 else "i32",
    )  # fmt: skip
    name = f"draft {case.dim} {x[1:]} group {case.group} rows {case.rows} {case.query}" + " indexed" * case.indexed
    return [Compiled(name, draft_kernel, types, constants, options, True), *_merged(name, case.splits, case.dim, x)]


def _verify(case: VerifyCase) -> list[Compiled]:
    from bd_kernels.verify_attention import verify_constants, verify_kernel

    x = POINTERS[case.dtype]
    out = x if case.splits == 1 else "*fp32"
    constants, options = verify_constants(*case[:3], case.dtype, case.splits)
    types = _types(
        verify_kernel, constants, Q=x, K=x, V=x, OUT=out, LSE=out, LENGTH="*i64", scale="fp32",
        rows=1 if case.rows == 1 else "i32",
    )  # fmt: skip
    name = f"verify {case.dim} {x[1:]} group {case.group} rows {case.rows}"
    return [Compiled(name, verify_kernel, types, constants, options, True), *_merged(name, case.splits, case.dim, x)]


def _chunks(case: ChunkCase) -> list[Compiled]:
    from bd_kernels.chunk_select import compact_constants, compact_kernel, score_constants, score_kernel

    x, dim = POINTERS[case.dtype], case.dim
    name = f"{dim} {x[1:]} group {case.group}" + " rotated" * case.rotate
    scores = score_constants(dim, case.group, 16, 8, case.rotate, False)
    official = score_constants(dim, 1, 1, 8, False, True)
    pointers = {"QUERIES": x, "KEYS": x, "COS": x, "SIN": x, "SCORES": "*fp32", "scale": "fp32"}
    kept = compact_constants(dim, case.rotate)
    tensors = dict.fromkeys(("KEYS", "VALUES", "COS", "SIN", "KEPT_KEYS", "KEPT_VALUES"), x)
    return [
        Compiled(f"score {name}", score_kernel, _types(score_kernel, scores, **pointers), scores),
        Compiled(f"official {name}", score_kernel, _types(score_kernel, official, **pointers, queries=1), official),
        Compiled(f"compact {name}", compact_kernel, _types(compact_kernel, kept, **tensors, INDEX="*i32"), kept),
    ]


def _layer(case: LayerCase) -> list[Compiled]:
    from bd_kernels import between as b

    x = POINTERS[case.dtype]
    rotate, rotate_options = b.rotate_constants(case.dim, case.rotate_q)
    pointers = dict.fromkeys(("QK", "V", "Q", "KEYS", "VALUES", "COS", "SIN"), x) | {"POSITION": "*i64", "SLOT": "*i64"}
    norm, norm_options = b.norm_constants(case.width)
    stream = dict.fromkeys(("X", "Y", "WEIGHT", "OUT"), x) | {"eps": "fp32"}
    gate, gate_options = b.gate_constants()
    types = [
        _types(b.rotate_store_kernel, rotate, **pointers),
        _types(b.add_norm_kernel, norm, **stream),
        _types(b.gate_kernel, gate, GATE_UP=x, OUT=x),
    ]
    name = f"{case.dim} {x[1:]}" + " queries too" * case.rotate_q
    return [
        Compiled(f"rotate {name}", b.rotate_store_kernel, types[0], rotate, rotate_options),
        Compiled(f"norm {case.width} {x[1:]}", b.add_norm_kernel, types[1], norm, norm_options),
        Compiled(f"gate {x[1:]}", b.gate_kernel, types[2], gate, gate_options),
    ]


def _loss(case: LossCase) -> list[Compiled]:
    from bd_kernels.head_loss import gradient_kernel, loss_constants, loss_kernel

    x = POINTERS[case.dtype]
    constants, options = loss_constants(case.kind)
    shared = {"Z": x, "Y": x, "SUMS": "*fp32", "BEST": "*i32", "inverse_temperature": "fp32"}
    name = f"{case.kind} {x[1:]}"
    forward = _types(loss_kernel, constants, **shared, LOSS="*fp32", ALPHA="*fp32", HIT="*i8")
    backward = _types(gradient_kernel, constants, **shared, SCALE="*fp32")
    return [
        Compiled(f"loss {name}", loss_kernel, forward, constants, options),
        Compiled(f"gradient {name}", gradient_kernel, backward, constants, options),
    ]


def _accept(case: AcceptCase) -> list[Compiled]:
    from bd_kernels import accept as a

    x = POINTERS[case.dtype]
    rows = a.row_constants(case.gamma)
    decide = {"COMMIT": case.gamma > 0, **rows, **a.block_constants(case.vocab)}
    verdict = {"DRAFT": "*i64", "TOKENS": "*i64", "ACCEPTED": "*i32", "IDS": "*i64", "LENGTH": "*i64"}
    verdict |= {"gamma": 1} if case.gamma == 1 else {}
    draws = {"DRAFT": "*i64", "UNIFORM": "*fp32", "P": "*fp32", "Q": "*fp32", "MASS": "*fp32"}
    small = {"gamma": 1} if case.gamma == 1 else {}
    top = {"TOP": "*fp32", "BEST": "*i32"}
    greedy, choose = a.greedy_blocks_kernel, a.greedy_commit_kernel
    blocks, draw = a.residual_blocks_kernel, a.residual_commit_kernel
    name = f"gamma {case.gamma} vocab {case.vocab}"
    return [
        Compiled(f"greedy blocks {x[1:]}", greedy, _types(greedy, {}, LOGITS=x, **top), {}),
        Compiled(f"greedy commit {name}", choose, _types(choose, decide, **top, **verdict), decide, a.GREEDY_WARPS),
        Compiled(f"residual blocks {name}", blocks, _types(blocks, rows, **draws, **small), rows),
        Compiled(f"residual commit {name}", draw, _types(draw, decide, **{**draws, **verdict}), decide),
    ]


_MAKERS = [
    (_draft, DRAFT + ENGINE_DRAFT),
    (_verify, VERIFY + ENGINE_VERIFY),
    (_chunks, CHUNKS),
    (_layer, LAYERS),
    (_loss, LOSSES),
    (_accept, ACCEPTS),
]
