"""What this machine offers and whether the pieces work: versions, device, dtype, memory speed, store, pocket pair."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bdcli.backends.select import pick_backend, torch_backend
from bdcli.base.devices import cpu_has_bfloat16, dtype_name, pick_device, pick_dtype
from bdcli.base.errors import BdcliError
from bdcli.base.files import explain
from bdcli.base.progress import SILENT
from bdcli.base.provenance import git_revision, machine, versions
from bdcli.cache.selection import CacheSize, parse_selection
from bdcli.cli import doctor_limits
from bdcli.data.prompts import cut_prompt, stdlib_text
from bdcli.model.checkpoint import load_model
from bdcli.model.hub import POCKET
from bdcli.model.tokenizer import load_tokenizer
from bdcli.results.store import Store

LOGIT_TOLERANCE = 1e-4  # of fp32 logits between two backends, over their spread
GIB = 2**30
STREAM_BYTES = 256 * 2**20  # too many for any cache here


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    detail: str


def checks(store: str | None) -> Iterator[Check]:
    """Yield the checks one by one; each is independent of the others' outcome."""
    device = pick_device("auto")
    for name, work in {
        "versions": lambda: ", ".join(f"{k} {v}" for k, v in versions().items()),
        "revision": lambda: git_revision() or "not a git checkout",
        "machine": machine,
        "memory": doctor_limits.memory,
        "threads": doctor_limits.threads,
        "places": doctor_limits.places,
        "disk": lambda: doctor_limits.disk(store),
        "terminal": doctor_limits.terminal,
        "device": lambda: _device(device),
        "dtype": lambda: _dtype(device),
        "attention": lambda: _attention(device),
        "kernels": lambda: _kernels(device),
        "stream read": lambda: f"{_stream_read():.1f} GB/s from memory",
        "store": lambda: _store(store),
        "pocket pair": _pocket,
        "memory at 16K": lambda: decoding_memory(16384),
    }.items():
        try:
            yield Check(name, True, work())
        except BdcliError as error:
            yield Check(name, False, str(error))
        except OSError as error:
            yield Check(name, False, str(explain(error)))


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return "cpu (no CUDA device found)"
    free, total = torch.cuda.mem_get_info(device)
    return f"{torch.cuda.get_device_name(device)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"


def _dtype(device: torch.device) -> str:
    dtype = dtype_name(pick_dtype("auto", device))
    native = "multiplies" if cpu_has_bfloat16() else "does not multiply"
    return f"auto means {dtype} (this CPU {native} bf16 itself)"


def _store(where: str | None) -> str:
    store = Store(where)
    return f"{store.name}: writable, {len(store.runs())} runs"


def _stream_read() -> float:
    """GB/s of the best of five sums over STREAM_BYTES."""
    data = torch.ones(STREAM_BYTES // 4)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - started)
    return STREAM_BYTES / best / 1e9


def _attention(device: torch.device) -> str:
    """What `decode` would run with the pocket pair here, compared with torch on a few dozen real tokens.

    In fp32 on a CPU; on a GPU in the dtype that auto means there, where torch's own error in it is the yardstick.
    """
    dtype = torch.float32 if device.type == "cpu" else pick_dtype("auto", device)
    target, exact = (load_model(POCKET / "target", kind, device) for kind in (dtype, torch.float32))
    engine = pick_backend("auto", [target], SILENT)
    ids = load_tokenizer(POCKET / "target")(stdlib_text()[:400], verbose=False)["input_ids"]
    rows = []
    for kind, model in ((torch_backend(), exact), (torch_backend(), target), (engine, target)):
        size = CacheSize(60, 300, 300)
        runner = kind.drafter(model, parse_selection(80, gamma=4), size, target.config.vocab_size).runner
        runner.prefill(ids[:60])
        rows.append(runner.feed(ids[60:65], 5))
    plain, ours = (float((row - rows[0]).abs().max() / rows[0].std()) for row in rows[1:])
    if not ours < max(LOGIT_TOLERANCE, 2 * plain):
        raise BdcliError(
            f"{engine.name} logits differ from torch's by {ours:.1e} of their spread", "Use --engine torch"
        )
    return f"{engine.name} ({engine.detail}); logits within {ours:.0e} of torch's"


def _kernels(device: torch.device) -> str:
    """Every Triton kernel against its reference, where there is a device for them."""
    if device.type != "cuda":
        return "Triton's need a GPU; nothing to check here"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed, so torch decodes"
    from bd_kernels.self_check import checks

    found = dict(checks(device, pick_dtype("auto", device)))
    bad = [f"{name} ({share:.1f} times what is allowed)" for name, share in found.items() if not share <= 1]
    if bad:
        raise BdcliError(f"kernels differ from their references: {', '.join(bad)}", "Use --engine torch")
    return f"{len(found)} Triton kernels agree with their references"


def _pocket() -> str:
    sizes = []
    for role in ("target", "drafter"):
        model = load_model(POCKET / role, torch.float32, torch.device("cpu"))
        if not all(bool(t.isfinite().all()) for t in model.tensors()):
            raise BdcliError(f"pocket {role} has non-finite weights")
        sizes.append(f"{role} {sum(t.numel() for t in model.tensors()) / 1e6:.1f} M parameters")
    return f"{', '.join(sizes)}, {len(load_tokenizer(POCKET / 'target'))} tokens"


def decoding_memory(context: int) -> str:
    """Resident size of a process that has decoded with the pocket pair after a prompt of `context` tokens."""
    prompt = cut_prompt(load_tokenizer(POCKET / "target"), stdlib_text(), context)
    with tempfile.TemporaryDirectory() as folder:
        words = ["--json", "--max-new-tokens", "8", "--baseline", "off", "--db", str(Path(folder) / "runs.db")]
        command = [sys.executable, "-m", "bdcli", "decode", "-", *words]
        done = subprocess.run(command, input=prompt, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise BdcliError(f"decoding {context} tokens failed: {done.stderr.strip().splitlines()[-1]}")
    run = json.loads(done.stdout)
    parts = run["weight_bytes"], run["target_kv_bytes"] + run["drafter_kv_bytes"]
    weights, kv, rest = (size / 1e6 for size in (*parts, run["resident_bytes"] - sum(parts)))
    whole = run["resident_bytes"] / 1e6
    return f"{whole:.0f} MB resident = weights {weights:.0f} + KV {kv:.0f} + everything else {rest:.0f}"
