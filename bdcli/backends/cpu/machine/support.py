"""Whether this machine and these models can use compiled steps, without compiling anything."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys

import torch

from bdcli.backends.cpu.machine.code_cache import code_folder
from bdcli.model.llama import Model


def obstacle(models: list[Model]) -> str | None:
    """Why compiled steps cannot run here, in a few words; None when they can."""
    if any(m.device.type != "cpu" for m in models):
        return f"{models[0].device.type} device"
    return processor_obstacle() or next((why for why in map(_shape, models) if why), None)


def processor_obstacle() -> str | None:
    """`obstacle` of this machine, whatever the models."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"{platform.system()} on {platform.machine()}, not Linux on x86-64"
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    if not {"avx2", "fma"} <= processor_features():
        return "a processor without AVX2 and FMA"
    return None


def _shape(model: Model) -> str | None:
    c = model.config
    if model.dtype not in (torch.bfloat16, torch.float32):
        return str(model.dtype).removeprefix("torch.")
    odd = {"hidden size": c.hidden_size, "MLP width": c.intermediate_size, "head dimension": c.head_dim}
    return next((f"{name} {size} is no multiple of 32" for name, size in odd.items() if size % 32), None)


def processor_features() -> set[str]:
    import llvmlite.binding

    return {name for name, there in llvmlite.binding.get_host_cpu_features().items() if there}


def dots_pay() -> bool:
    """Whether the processor's own dot product of bf16 pairs is the faster one: on AMD it is, on Intel not.

    Measured in docs/log/2026-11-26-zen4-dot.md.

    What the processor is decides, never a measurement: these products round otherwise, and text should not depend on
    how busy a machine was.
    """
    import llvmlite.binding

    return "avx512bf16" in processor_features() and llvmlite.binding.get_host_cpu_name().startswith("znver")


def thread_limit() -> int:
    """Threads that this process should use: OMP_NUM_THREADS if set, within the processors it may run on."""
    allowed = len(os.sched_getaffinity(0))
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return max(1, min(allowed, int(wanted))) if wanted.isdigit() and int(wanted) > 0 else allowed


def processors_to_keep(threads: int) -> list[int | None]:
    """The processor that each thread of the pool is to stay on, None where the system decides: see BDCLI_PIN.

    The first thread is the caller's and never pinned, because torch's threads would inherit that.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if os.environ.get("BDCLI_PIN", "0") in ("", "0"):
        return [None] * threads
    return [None, *(allowed[i % len(allowed)] for i in range(1, threads))]


def describe() -> str:
    features = processor_features()
    vectors = "AVX-512" if "avx512f" in features else "AVX2"
    vectors += ", AMX where it is faster" if "amx-bf16" in features else ""
    vectors += ", bf16 dot products" if dots_pay() else ""
    threads = thread_limit()
    return f"numba, {vectors}, {threads} thread{'s' if threads > 1 else ''}"


def is_compiled() -> bool:
    """False when the next use has to compile first."""
    return any(code_folder().rglob("*.nbc"))
