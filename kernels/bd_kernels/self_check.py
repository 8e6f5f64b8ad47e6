"""Each kernel once against its reference on small random inputs; `bdcli doctor` runs it where there is a GPU.

`python -m bd_kernels.self_check [--device cuda] [--dtype bfloat16]` prints one line a kernel. The thorough comparison
is the test suite's (`make test-gpu`); this one takes seconds and needs nothing but the installed package.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bd_kernels import accept, between, chunk_select, draft_attention, head_loss, reference, verify_attention

FACTOR = 4  # of the error that eager torch makes in the same precision


def checks(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, float]]:
    """(kernel, its error over what is allowed) against fp64; above 1, or NaN, is a fault."""
    g = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).to(device, dtype)

    angles = torch.randn(128, 32, generator=g, dtype=torch.float64).repeat(1, 2)
    sign = torch.tensor([-1.0, 1.0]).repeat_interleave(32)
    rope = angles.cos().to(device, dtype), (angles.sin() * sign).to(device, dtype)
    at, place = torch.tensor([90], device=device), torch.arange(3, device=device)
    view = {"sinks": 4, "chosen": 16, "window": 40, "ring": 50}
    q, k, v = randn(1, 2, 4, 64), randn(1, 2, 70, 64), randn(1, 2, 70, 64)

    def draft(f: Callable, q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> tuple:
        return (f(q, k, v, at, **view, rope=tables),)

    def store(f: Callable, qkv: Tensor, keys: Tensor, values: Tensor, *tables: Tensor) -> tuple:
        keys, values = keys.clone(), values.clone()
        return f(*qkv.split((6, 2), 1), keys, values, place + 7, place * 5, tables, True), keys, values

    def choose(f: Callable, keys: Tensor, values: Tensor) -> tuple:
        into = torch.zeros_like(keys[:16].transpose(0, 1)), torch.zeros_like(keys[:16].transpose(0, 1))
        f(keys, values, torch.arange(32, device=device, dtype=torch.int32).view(2, 16), *into)
        return into

    def norm(f: Callable, x: Tensor, y: Tensor, weight: Tensor) -> tuple:
        x = x.clone()
        return f(x, y, weight, 1e-5), x

    def loss(f: Callable, z: Tensor, y: Tensor) -> tuple:
        z = z.clone()
        losses, alpha, _ = f(z, y, "lk", 0.8, torch.ones(len(z), device=device))
        return losses, alpha, z

    verify = verify_attention.verify_attention
    compared = {
        "draft attention": (draft, draft_attention.draft_attention, reference.draft_attention, q, k, v, *rope),
        "verify attention": (
            lambda f, q, k, v: (f(q, k, v, at - 50),), verify, reference.verify_attention, randn(1, 8, 4, 64), k, v,
        ),
        "rotate and store": (
            store, between.rotate_store, reference.rotate_store, randn(3, 8, 64), randn(2, 16, 64), randn(2, 16, 64),
            *rope,
        ),
        "add and norm": (norm, between.add_norm, reference.add_norm, randn(3, 200), randn(3, 200), randn(200)),
        "gate": (lambda f, x: (f(x),), between.gate, reference.gate, randn(3, 400)),
        "chunk scores": (
            lambda f, q, k: (f(q, k, 8).to(q.dtype),), chunk_select.chunk_scores, reference.chunk_scores,
            randn(5, 4, 64), randn(48, 2, 64),
        ),
        "compaction": (choose, chunk_select.compact, reference.compact, randn(48, 2, 64), randn(48, 2, 64)),
        "head loss": (loss, head_loss.loss_rows, reference.loss_rows, 2 * randn(5, 700), 2 * randn(5, 700)),
    }  # fmt: skip
    for name, (run, kernel, twin, *given) in compared.items():
        truth = run(twin, *(x.double() for x in given))
        pairs = zip(run(kernel, *given), run(twin, *given), truth, strict=True)
        yield name, max(_share(*(x.detach() for x in trio)) for trio in pairs)
    yield from _verdicts(g, device)


def _share(got: Tensor, eager: Tensor, truth: Tensor) -> float:
    """Largest error over what is allowed; 1e9 where something is not finite."""
    rounding = torch.finfo(eager.dtype).eps / 2 * truth.abs().max()
    if eager.dtype is torch.float32:
        rounding = rounding * 8  # an fp32 loss is a difference of logarithms, of that size
    allowed = FACTOR * torch.maximum((eager.double() - truth).abs().max(), rounding)
    error = float((got.double() - truth).abs().max() / allowed)
    return error if error == error else 1e9


def _verdicts(g: torch.Generator, device: torch.device | str) -> Iterator[tuple[str, float]]:
    """Verdicts are whole numbers: equal or not."""
    logits = torch.randn(3, 6, 3000, generator=g).to(device)
    draft = logits[:, :5].argmax(-1)
    draft[1, 2] += 1
    want = reference.accept_greedy(draft, logits)
    yield "accept greedy", float(not _equal(accept.accept_greedy(draft, logits), want)) * 1e9
    p, q = logits.softmax(-1), (logits[:, :5] * 0.9).softmax(-1)
    uniform = torch.rand(3, 6, generator=g).to(device)
    want = reference.accept_sampled(draft, q, p, uniform)
    yield "accept sampled", float(not _equal(accept.accept_sampled(draft, q, p, uniform), want)) * 1e9


def _equal(got: tuple, want: tuple) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    options = parser.parse_args()
    found = dict(checks(torch.device(options.device), getattr(torch, options.dtype)))
    for name, share in found.items():
        print(f"{name:18} {'ok' if share <= 1 else 'FAULT'}  {share:.2f} of what is allowed")
    return int(any(not share <= 1 for share in found.values()))


if __name__ == "__main__":
    sys.exit(main())
