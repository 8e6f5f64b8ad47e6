"""Where a model computes and in which dtype, when the user leaves it open."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from bdcli.base.cgroup import read_limits
from bdcli.base.errors import UserError

RUNTIME_BYTES = 512 << 20  # of a GPU that libraries, compiled kernels and graphs take beside tensors
# of a process that has decoded: Python, torch, the tokenizer and compiled code; resident beside tensors
HOST_RUNTIME_BYTES = 400 << 20
UNTOUCHED_BYTES = 192 << 20  # of an address space that stacks and arenas map and never fill
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str) -> torch.device:
    """The device to compute on; from here on torch uses no more threads than this process may.

    Raises UserError where it cannot be used, or holds no numbers.
    """
    if torch.get_num_threads() > thread_limit():
        torch.set_num_threads(thread_limit())
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()
    except Exception:  # every kind of device has its own
        raise UserError(f"--device {device} is not usable here", "Try --device cpu, or see bdcli doctor") from None
    return chosen


def thread_limit() -> int:
    """Threads that this process should use: whole processors of its CPU quota, of those it may run on, and
    OMP_NUM_THREADS at most. Threads that meet at barriers inside a quota of fewer processors wait for each other.
    """
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bounds = [here, int(read_limits().cpus or here)]
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if wanted.isdigit() and int(wanted) > 0:
        bounds.append(int(wanted))
    return max(1, min(bounds))


def cpu_has_bfloat16() -> bool:
    """True where the CPU multiplies bf16 itself; elsewhere torch emulates it and fp32 is faster."""
    known = _capabilities()
    names = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
    return any(known.get(name, False) for name in names)


def compiled_steps_can_run() -> bool:
    """Whether this processor and system are those that compiled steps are written for (`bdcli.backends.cpu`)."""
    linux = sys.platform == "linux" and platform.machine() == "x86_64"
    known = _capabilities()
    return linux and known.get("avx2", False) and known.get("fma3", False) and find_spec("numba") is not None


def pick_dtype(dtype: str, device: torch.device, engine: str = "auto") -> torch.dtype:
    """`auto`: bf16 where the device computes in it or compiled steps read it, else fp16 on a GPU and fp32 on a CPU."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    reads = cpu_has_bfloat16() or (engine in ("auto", "compiled") and compiled_steps_can_run())
    return torch.bfloat16 if device.type == "cpu" and reads else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """As options and the store have it."""
    return str(dtype).removeprefix("torch.")


def product_dtype(kind: str) -> torch.dtype:
    """bf16 where a device of that type multiplies large matrices of it faster than of fp32, else fp32.

    On a CPU that takes more than bf16 instructions: Intel's vector ones alone take 1.8 times as long as fp32
    (docs/log/2026-11-25-fp32-no-tiles.md).
    """
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    known = _capabilities()
    vectors_only = "Intel" in known.get("cpu_name", "") and not known.get("amx_bf16", False)
    return torch.bfloat16 if cpu_has_bfloat16() and not vectors_only else torch.float32


def training_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What the products of a training forward run in; weights stay fp32. `auto`: the faster one."""
    return product_dtype(device.type) if precision == "auto" else DTYPES[precision]


def _capabilities() -> dict:
    """What torch knows of the CPU; older versions report nothing."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def free_memory(device: torch.device) -> int:
    """Bytes that tensors may still take: on a GPU including what torch has reserved without using it; else of the
    machine's memory, below the limits of this process's groups and of the process itself.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused - RUNTIME_BYTES
    bounds = [psutil.virtual_memory().available, *_address_space()]
    limit = read_limits().memory
    return max(0, min([*bounds, *([] if limit is None else [limit])]))


def _address_space() -> Iterator[int]:
    """Bytes that this process may still map, where its address space or its data are limited (`ulimit -v`, `-d`)."""
    with contextlib.suppress(ImportError, OSError):
        import resource

        fields = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        kilobytes = {words[0]: int(words[1]) for words in fields if words[:1] in (["VmSize:"], ["VmData:"])}
        for kind, used in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
            limit = resource.getrlimit(kind)[0]
            if limit != resource.RLIM_INFINITY:
                yield limit - 1024 * kilobytes[used] - UNTOUCHED_BYTES


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    return psutil.Process().memory_info().rss


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak on a GPU, the process's peak resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return info.peak_wset
    status = Path("/proc/self/status")
    if status.exists():  # Linux: ru_maxrss begins at what the process that started this one held
        lines = status.read_text("ascii", "replace").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
