"""What this device makes of the kernels and of the engine: right first, then fast. One short table, one JSON file.

    python scripts/gpu_speed.py                          # a GPU: everything, some ten minutes
    python scripts/gpu_speed.py --parts check,attention  # some of: check, attention, engine
    python scripts/gpu_speed.py --tiny                   # any machine: does the script run? Plain operations on a CPU

Ceilings are measured here, never taken from a data sheet: a copy within the device, and the time that a kernel which
does nothing adds to a CUDA graph. The last table compares what was measured with what is wanted.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from bdcli.backends.cuda import caches, program
from bdcli.backends.cuda.ops import ops_for
from bdcli.backends.cuda.support import describe
from bdcli.backends.select import Backend, static_backend, torch_backend
from bdcli.base.devices import pick_device, pick_dtype
from bdcli.base.progress import Progress
from bdcli.base.provenance import git_revision, machine, versions
from bdcli.bench import shapes
from bdcli.bench.attention import AttentionBench
from bdcli.cache.selection import CacheSize, Window
from bdcli.data.prompts import stdlib_text
from bdcli.model.checkpoint import load_model
from bdcli.model.hub import POCKET
from bdcli.model.llama import Model
from bdcli.model.tokenizer import load_tokenizer
from bdcli.speculation.baseline import teacher_force
from bdcli.speculation.draft_length import FixedGamma
from bdcli.speculation.sampling import Sampling
from bdcli.speculation.speculator import Speculator

ROOT = Path(__file__).parent.parent
DEVICE_TESTS = ("kernels/test_device.py", "backends/test_cuda.py")
PARTS = ("check", "attention", "engine")
SPARE_TOKENS = 20  # of a cache, for the rows of a round
BUDGET, GAMMA = 256, 5  # of the texts that are compared
TEXT_CHARACTERS = 200_000  # of the prompts' source


@dataclasses.dataclass(frozen=True)
class Size:
    """How much to do: for `AttentionBench`, for `ShapeBench`, and texts of the pocket pair."""

    contexts: tuple[int, ...] = (4096, 8192, 16384)
    batch: int = 64
    heads: int = 32  # of Llama-2-7B
    budget: int = 512
    rows: tuple[int, ...] = (1, 2, 4, 8, 16)
    calls: int = 20
    repeats: int = 15
    shape: str = "llama2-7b+68m"
    gammas: tuple[int, ...] = shapes.GAMMAS
    budgets: tuple[int | None, ...] = shapes.BUDGETS
    prompts: tuple[int, ...] = (600, 4096, 16000)
    new_tokens: int = 96


TINY = Size(
    contexts=(256, 512),
    batch=2,
    heads=2,
    budget=128,
    rows=(1, 8),
    calls=2,
    repeats=2,
    shape="tiny+tiny",
    gammas=(1, 7),
    budgets=(128, None),
    prompts=(200,),
    new_tokens=12,
)


class Notes(Progress):
    """Shows notes on stderr."""

    def note(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


NOTES = Notes()


def environment(device: torch.device) -> dict:
    found = {"machine": machine(), "versions": versions(), "revision": git_revision(), "device": str(device)}
    if device.type == "cuda":
        words = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        found["gpu"] = done.stdout.strip() or torch.cuda.get_device_name(device)
        found["processors"] = torch.cuda.get_device_properties(device).multi_processor_count
    return found


# -- right


def check(device: torch.device, size: Size, backend: Backend) -> dict:
    """Kernels against references, the device tests of the suite where they are, and greedy text against torch's."""
    found: dict = {"texts": list(texts(device, size, backend))}
    if device.type != "cuda":
        return found
    from bd_kernels.self_check import checks

    found["self_check"] = {str(kind)[6:]: dict(checks(device, kind)) for kind in (torch.bfloat16, torch.float16)}
    files = [str(ROOT / "tests" / name) for name in DEVICE_TESTS if (ROOT / "tests" / name).exists()]
    if files:
        NOTES.note("device tests")
        several = ["-n", "8"] if importlib.util.find_spec("xdist") else []
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *several, *files]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
        found["tests"] = {"exit": done.returncode, "tail": done.stdout.splitlines()[-15:]}
    return found


def texts(device: torch.device, size: Size, backend: Backend) -> Iterator[dict]:
    """Greedy text of the pocket pair in whole rounds against torch's own, by the rule of `TieRule` where they differ.

    In fp32 texts must simply be equal.
    """
    ids = load_tokenizer(POCKET / "target")(stdlib_text()[:TEXT_CHARACTERS], verbose=False)["input_ids"]
    for dtype in (torch.float32, pick_dtype("auto", device)) if device.type == "cuda" else (torch.float32,):
        models = [load_model(POCKET / role, dtype, device) for role in ("target", "drafter")]
        for length in size.prompts:
            NOTES.note(f"text after {length} tokens, {dtype}")
            prompt, capacity = ids[:length], length + size.new_tokens + SPARE_TOKENS
            cache_size = CacheSize(length, capacity, capacity)
            text, accepted = generate(backend, models, cache_size, prompt, size.new_tokens)
            plain, _ = generate(torch_backend(), models, cache_size, prompt, size.new_tokens)
            equal, ties = text == plain, 0
            if not equal and dtype is not torch.float32:
                runner = torch_backend().target(models[0], cache_size)
                runner.prefill(prompt[:-1])
                rule = teacher_force(runner, prompt, text)
                equal, ties = rule.equal, rule.ties
            yield {"dtype": str(dtype)[6:], "prompt": length, "equal": equal, "ties": ties, "accepted": accepted}


def generate(
    backend: Backend, models: list[Model], size: CacheSize, prompt: list[int], new_tokens: int
) -> tuple[list[int], int]:
    """Greedy text, and how many proposed tokens were accepted."""
    target = backend.target(models[0], size)
    drafter = backend.drafter(models[1], Window(BUDGET, gamma=GAMMA), size, models[0].config.vocab_size)
    run = Speculator(target, drafter, Sampling(), 0, models[0].device)
    run.prefill(prompt)
    accepted = sum(r.accepted for r in run.rounds(new_tokens, frozenset(), FixedGamma(GAMMA)))
    return run.new_tokens, accepted


# -- fast


def attention(device: torch.device, dtype: torch.dtype, size: Size) -> dict:
    """The attention kernels."""
    bench = AttentionBench(
        device,
        dtype,
        contexts=size.contexts,
        rows=size.rows,
        budget=size.budget,
        batch=size.batch,
        heads=size.heads,
        calls=size.calls,
        repeats=size.repeats,
    )
    return bench.measure(NOTES)


def rounds(device: torch.device, dtype: torch.dtype, size: Size, backend: Backend) -> dict:
    """The pair's shapes in whole rounds and, at the first context, without the kernels between a layer's products."""
    bench = shapes.ShapeBench(
        shapes.parse_shape(size.shape),
        size.contexts,
        dtype,
        device,
        gammas=size.gammas,
        budgets=size.budgets,
        repeats=size.repeats,
    )
    bench.check_memory(NOTES)
    found = bench.measure(backend, NOTES)
    NOTES.note("without the kernels between products")
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
        other = small.measure(backend)
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
    backend = static_backend("triton", describe(device)) if cuda else static_backend("plain", "no kernels: a CPU")
    found: dict = {"environment": environment(device)}
    work = {
        "check": lambda: check(device, size, backend),
        "attention": lambda: attention(device, dtype, size),
        "engine": lambda: rounds(device, dtype, size, backend),
    }
    for part in parts:
        NOTES.note(part)
        found[part] = work[part]()
        found["verdicts"] = [dict(zip(("what", "measured", "wanted", "holds"), row)) for row in verdicts(found)]
        options.out.write_text(json.dumps(found, indent=1))  # what is known so far survives what comes
    print(json.dumps(found["environment"]))
    print("\n".join(table(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
