"""What this device makes of the kernels and of the engine: right first, then fast. One short table, one JSON file.

    python scripts/gpu_speed.py                          # a GPU: everything, some ten minutes
    python scripts/gpu_speed.py --parts check,attention  # some of: check, attention, engine
    python scripts/gpu_speed.py --tiny                   # any machine: does the script run? Plain operations on a CPU

Ceilings are measured here, never taken from a data sheet: a copy within the device, and the time that a kernel which
does nothing adds to a CUDA graph. Small kernels are timed as many calls in one graph. The last table holds what was
measured against what is wanted.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from bdcli.backends.cuda import caches, program
from bdcli.backends.cuda.graph import capture, new_pool
from bdcli.backends.cuda.ops import ops_for
from bdcli.backends.cuda.support import describe
from bdcli.backends.select import Backend, static_backend, torch_backend
from bdcli.base.devices import pick_device, pick_dtype
from bdcli.base.progress import Progress
from bdcli.base.provenance import git_revision, machine, versions
from bdcli.bench import shapes
from bdcli.bench.timing import copy_speed, wait
from bdcli.cache.selection import CacheSize, Window
from bdcli.data.prompts import stdlib_text
from bdcli.model.checkpoint import POCKET, load_model, load_tokenizer
from bdcli.speculation.baseline import teacher_force
from bdcli.speculation.draft_length import FixedGamma
from bdcli.speculation.sampling import Sampling
from bdcli.speculation.speculator import Speculator

ROOT = Path(__file__).parent.parent
DEVICE_TESTS = ("kernels/test_device.py", "backends/test_cuda.py")
PARTS = ("check", "attention", "engine")
SPARE_TOKENS = 20  # of a cache, for the rows of a round
HEADS, DIM = 32, 128  # of Llama-2-7B, whose target is the larger of the pair


@dataclasses.dataclass(frozen=True)
class Size:
    """How much to do. `batch` sequences fill the chip; `calls` of a kernel make one graph."""

    contexts: tuple[int, ...] = (4096, 8192, 16384)
    batch: int = 64
    heads: int = HEADS
    budget: int = 512
    rows: tuple[int, ...] = (1, 2, 4, 8, 16)
    calls: int = 20
    rounds: int = 15
    shape: str = "llama2-7b+68m"
    gammas: tuple[int, ...] = shapes.GAMMAS
    budgets: tuple[int | None, ...] = shapes.BUDGETS
    prompts: tuple[int, ...] = (600, 4096, 16000)
    new_tokens: int = 96


TINY = Size((256, 512), 2, 2, 128, (1, 8), 2, 2, "tiny+tiny", (1, 7), (128, None), (200,), 12)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Notes(Progress):
    """Shows notes on stderr."""

    note = staticmethod(say)


def environment(device: torch.device) -> dict:
    found = {"machine": machine(), "versions": versions(), "revision": git_revision(), "device": str(device)}
    if device.type == "cuda":
        words = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        found["gpu"] = done.stdout.strip() or torch.cuda.get_device_name(device)
        found["processors"] = torch.cuda.get_device_properties(device).multi_processor_count
    return found


def microseconds(call: Callable[[], object], device: torch.device, size: Size) -> float:
    """Of one call among many in one graph; the median of some replays."""

    def many() -> None:
        for _ in range(size.calls):
            call()

    run, taken = capture(many, device, new_pool(device)), []
    for _ in range(size.rounds + 2):
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        taken.append(1e6 * (time.perf_counter() - began) / size.calls)
    return statistics.median(taken[2:])


# -- right


def check(device: torch.device, size: Size, engine: Backend) -> dict:
    """Kernels against references, the device tests of the suite where they are, and greedy text against torch's."""
    found: dict = {"texts": [*texts(device, size, engine)]}
    if device.type != "cuda":
        return found
    from bd_kernels.self_check import checks

    found["self_check"] = {str(kind)[6:]: dict(checks(device, kind)) for kind in (torch.bfloat16, torch.float16)}
    files = [str(ROOT / "tests" / name) for name in DEVICE_TESTS if (ROOT / "tests" / name).exists()]
    if files:
        say("device tests")
        several = ["-n", "8"] if importlib.util.find_spec("xdist") else []
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *several, *files]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
        found["tests"] = {"exit": done.returncode, "tail": done.stdout.splitlines()[-15:]}
    return found


def texts(device: torch.device, size: Size, engine: Backend) -> Iterator[dict]:
    """Greedy text of the pocket pair in whole rounds against torch's own, by the rule of `TieRule` where they differ.

    In fp32 texts must simply be equal.
    """
    ids = load_tokenizer(POCKET / "target")(stdlib_text()[:200_000], verbose=False)["input_ids"]
    for dtype in (torch.float32, pick_dtype("auto", device)) if device.type == "cuda" else (torch.float32,):
        models = [load_model(POCKET / role, dtype, device) for role in ("target", "drafter")]
        for length in size.prompts:
            say(f"text after {length} tokens, {dtype}")
            made = [_write(each, models, ids[:length], size.new_tokens, device) for each in (engine, torch_backend())]
            (text, accepted), (plain, _) = made
            equal, ties = text == plain, 0
            if not equal and dtype is not torch.float32:
                runner = torch_backend().target(models[0], _cache_size(length, size.new_tokens))
                runner.prefill(ids[: length - 1])
                rule = teacher_force(runner, ids[:length], text)
                equal, ties = rule.equal, rule.ties
            yield {"dtype": str(dtype)[6:], "prompt": length, "equal": equal, "ties": ties, "accepted": accepted}


def _write(engine: Backend, models: list, prompt: list[int], new: int, device: torch.device) -> tuple[list[int], int]:
    size, vocab = _cache_size(len(prompt), new), models[0].config.vocab_size
    target, drafter = engine.target(models[0], size), engine.drafter(models[1], Window(256, gamma=5), size, vocab)
    run = Speculator(target, drafter, Sampling(), 0, device)
    run.prefill(prompt)
    accepted = sum(r.accepted for r in run.rounds(new, frozenset(), FixedGamma(5)))
    return run.new_tokens, accepted


def _cache_size(prompt: int, new_tokens: int) -> CacheSize:
    capacity = prompt + new_tokens + SPARE_TOKENS
    return CacheSize(prompt, capacity, capacity)


# -- fast: attention


def attention(device: torch.device, dtype: torch.dtype, size: Size) -> dict:
    copied = copy_speed(device, 2**30 if device.type == "cuda" else 2**25)
    one = torch.zeros(1, device=device)
    launch = microseconds(lambda: one.add_(1), device, dataclasses.replace(size, calls=10 * size.calls))
    say(f"copy {copied:.0f} GB/s, launch floor {launch:.2f} us")
    return {
        "copy_gb_s": copied,
        "launch_us": launch,
        "draft": [*draft_kernel(device, dtype, size, copied)],
        "verify": [*verify_kernel(device, dtype, size, copied)],
    }


def draft_kernel(device: torch.device, dtype: torch.dtype, size: Size, copied: float) -> Iterator[dict]:
    """One query row over a full budget, rotated in the kernel, alone and for a batch that fills the chip."""
    view = Window(size.budget).view(10 * size.budget)
    table = torch.randn(20 * size.budget, DIM, device=device, dtype=dtype)
    for batch in (1, size.batch):
        q = torch.randn(batch, 1, size.heads, DIM, device=device, dtype=dtype)
        k, v = (torch.randn(batch, size.heads, size.budget, DIM, device=device, dtype=dtype) for _ in range(2))
        at = torch.full((batch,), 10 * size.budget, device=device)
        us = microseconds(
            lambda q=q, k=k, v=v, at=at: ops_for(device.type).draft_attention(
                q, k, v, at, view.sinks, view.chosen, view.window, view.ring, rope=(table, table)
            ),
            device, size,
        )  # fmt: skip
        floor = (k.nbytes + v.nbytes + 2 * q.nbytes) / copied / 1e3
        yield {"batch": batch, "heads": size.heads, "budget": size.budget, "us": us, "floor_us": floor}


def verify_kernel(device: torch.device, dtype: torch.dtype, size: Size, copied: float) -> Iterator[dict]:
    """New rows over one long cache, ours and others'; what another cannot do is written down as its error."""
    for context in size.contexts:
        k, v = (torch.randn(1, size.heads, context + 32, DIM, device=device, dtype=dtype) for _ in range(2))
        for rows in size.rows:
            q = torch.randn(1, rows, size.heads, DIM, device=device, dtype=dtype)
            length = torch.tensor([context], device=device)
            arms = {
                "us": lambda q=q, k=k, v=v, n=length: ops_for(device.type).verify_attention(q, k, v, n),
                "sdpa_us": sdpa(q, k, v, context),
                "flex_us": flex(q, k, v, context),
            }
            found = {}
            for name, call in arms.items():
                try:
                    found[name] = microseconds(call, device, size)
                except Exception as error:
                    if name == "us":
                        raise
                    found[name], found[name[:-3] + "_error"] = None, " ".join(str(error).split())[:200]
            floor = 2 * size.heads * (context + rows) * DIM * k.element_size() / copied / 1e3
            yield {"context": context, "rows": rows, "heads": size.heads, **found, "floor_us": floor}


def sdpa(q: Tensor, k: Tensor, v: Tensor, context: int) -> Callable[[], Tensor]:
    """torch's scaled-dot-product attention with the mask that rows after a context need."""
    rows = q.shape[1]
    k, v, queries = k[:, :, : context + rows], v[:, :, : context + rows], q.transpose(1, 2)
    mask = torch.zeros(rows, context + rows, device=q.device, dtype=q.dtype)
    mask[:, context:] = torch.full((rows, rows), -torch.inf, device=q.device, dtype=q.dtype).triu(1)
    mask = None if rows == 1 else mask
    return lambda: torch.nn.functional.scaled_dot_product_attention(queries, k, v, attn_mask=mask)


def flex(q: Tensor, k: Tensor, v: Tensor, context: int) -> Callable[[], Tensor]:
    """FlexAttention, compiled where there is a GPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows, made = q.shape[1], {}
    k, v, queries = k[:, :, : context + rows], v[:, :, : context + rows], q.transpose(1, 2)

    def call() -> Tensor:
        if not made:  # an error of its making is an error of this arm
            made["mask"] = create_block_mask(
                lambda _b, _h, row, key: key <= row + context, None, None, rows, context + rows, device=str(q.device)
            )
            made["run"] = torch.compile(flex_attention) if q.device.type == "cuda" else flex_attention
        return made["run"](queries, k, v, block_mask=made["mask"])

    return call


# -- fast: the engine


def whole_engine(device: torch.device, dtype: torch.dtype, size: Size, engine: Backend) -> dict:
    """The pair's shapes in whole rounds and, at the first context, without the kernels between a layer's products."""
    bench = shapes.ShapeBench(
        shapes.parse_shape(size.shape),
        size.contexts,
        dtype,
        device,
        gammas=size.gammas,
        budgets=size.budgets,
        repeats=size.rounds,
    )
    found = bench.measure(engine, Notes())
    say("without the kernels between products")
    plain = ops_for("cpu")
    unfused = dataclasses.replace(
        ops_for(device.type), add_norm=plain.add_norm, gate=plain.gate, rotate_store=plain.rotate_store
    )
    with (
        mock.patch.object(program, "ops_for", lambda _device: unfused),
        mock.patch.object(caches, "ops_for", lambda _device: unfused),
    ):
        small = dataclasses.replace(
            bench, contexts=size.contexts[:1], gammas=size.gammas[:1], budgets=size.budgets[:1], peers=False
        )
        other = small.measure(engine)
    found["unfused_ar_ms"] = other["contexts"][0]["ar_ms"]
    return found


# -- what is wanted


def verdicts(found: dict) -> Iterator[tuple[str, float | bool | None, str, bool | None]]:
    """(what, measured, wanted, whether it holds); None where a part was left out."""
    if "check" in found:
        yield "greedy text equals torch's", (ok := all(t["equal"] for t in found["check"]["texts"])), "yes", ok
        if "self_check" in found["check"]:
            worst = max(max(kinds.values()) for kinds in found["check"]["self_check"].values())
            yield "kernels' error / allowed", worst, "<= 1", worst <= 1
        if "tests" in found["check"]:
            yield "device tests pass", (ok := found["check"]["tests"]["exit"] == 0), "yes", ok
    if "attention" in found:
        a = found["attention"]
        small, full = a["draft"]
        yield (
            f"draft B={full['budget']}, batch {full['batch']}: us / byte floor",
            *_most(full["us"] / full["floor_us"], 1.2),
        )
        yield "draft, batch 1: us / launch floor", *_most(small["us"] / a["launch_us"], 2.0)
        rows = {r["rows"]: r for r in a["verify"] if r["context"] == max(x["context"] for x in a["verify"])}
        eight, one = rows[8], rows[1]
        yield f"verify 8 rows at {eight['context']}: us / one row", *_most(eight["us"] / one["us"], 1.15)
        yield "verify 8 rows: share of copy speed", *_least(eight["floor_us"] / eight["us"], 0.75)
    for cell in found.get("engine", {}).get("contexts", []):
        yield f"AR step at {cell['context']}: share of copy speed", *_least(cell["ar_share"], 0.8)
        if cell["host_share"] is not None:
            host = max(row["host_share"] for row in cell["rounds"].values())
            yield f"host's share of a round at {cell['context']}", *_most(host, 0.05)


def _most(value: float, bound: float) -> tuple[float, str, bool]:
    return value, f"<= {bound:g}", value <= bound


def _least(value: float, bound: float) -> tuple[float, str, bool]:
    return value, f">= {bound:g}", value >= bound


def table(found: dict) -> Iterator[str]:
    for d in found.get("attention", {}).get("draft", []):
        yield f"draft batch {d['batch']:3}  {d['us']:9.2f} us  byte floor {d['floor_us']:9.2f}"
    for r in found.get("attention", {}).get("verify", []):
        others = (f"{name} {r[f'{name}_us']:.1f}" if r[f"{name}_us"] else f"{name} failed" for name in ("sdpa", "flex"))
        yield f"verify {r['rows']:2} at {r['context']:5}  {r['us']:9.2f} us  byte floor {r['floor_us']:9.2f}  " + (
            ", ".join(others)
        )
    if "engine" in found:
        yield from shapes.lines(found["engine"])
        first = found["engine"]["contexts"][0]
        yield f"AR at {first['context']} without kernels between products: {found['engine']['unfused_ar_ms']:.3f} ms"
    for text in found.get("check", {}).get("texts", []):
        yield f"text after {text['prompt']} tokens, {text['dtype']}: equal {text['equal']}, ties {text['ties']}"
    for what, value, wanted, holds in verdicts(found):
        shown = ("yes" if value else "NO") if isinstance(value, bool) else f"{value:.3f}"
        yield f"{'ok  ' if holds else 'MISS'}  {what:48} {shown:>9}  wanted {wanted}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("kernels_bench.json"), help="JSON file to write")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of: " + ", ".join(PARTS))
    parser.add_argument("--shape", default=None, help="TARGET+DRAFTER of the engine part")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="sizes that any machine can do")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts {', '.join(unknown)}: known are {', '.join(PARTS)}")
    device = pick_device(options.device)
    if device.type != "cuda" and not options.tiny:
        parser.error("no CUDA device here; --tiny runs the script with plain operations instead of kernels")
    size = TINY if options.tiny else Size()
    if options.shape:
        size = dataclasses.replace(size, shape=options.shape)
    cuda = device.type == "cuda"
    dtype = pick_dtype("auto", device) if cuda else torch.float32
    engine = static_backend("triton", describe(device)) if cuda else static_backend("plain", "no kernels: a CPU")
    found: dict = {"environment": environment(device)}
    work = {
        "check": lambda: check(device, size, engine),
        "attention": lambda: attention(device, dtype, size),
        "engine": lambda: whole_engine(device, dtype, size, engine),
    }
    for part in parts:
        say(part)
        found[part] = work[part]()
        found["verdicts"] = [dict(zip(("what", "measured", "wanted", "holds"), row)) for row in verdicts(found)]
        options.out.write_text(json.dumps(found, indent=1))  # what is known so far survives what comes
    print(json.dumps(found["environment"]))
    print("\n".join(table(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
