"""A program as one CUDA graph, and the clock inside it. On other devices the program is simply called."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def capture(program: Callable[[], None], device: torch.device, pool) -> Callable[[], None]:
    """What runs `program` again and again over the same memory.

    On CUDA it runs once by itself, which compiles its kernels and sets up cuBLAS (neither may happen in a capture),
    and is then captured; the call that comes back replays it. `pool` is the memory of all graphs of one owner, of
    which never two run at a time, and whose results are copied into buffers of their own.
    """
    if device.type != "cuda":
        return program
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            program()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            program()
    return graph.replay


def new_pool(device: torch.device):
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


class Clock:
    """Marks inside a program. On CUDA they are event nodes of its graph, so that no mark waits for the device."""

    def __init__(self, device: torch.device, marks: int):
        self._events = None
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True, external=True) for _ in range(marks)]
        self._times = [0.0] * marks

    def mark(self, i: int) -> None:
        if self._events is None:
            self._times[i] = time.perf_counter()
        else:
            self._events[i].record()

    def seconds(self, first: int, last: int) -> float:
        """Between two marks of the run before; the caller has waited for it to end."""
        if self._events is None:
            return self._times[last] - self._times[first]
        return 1e-3 * self._events[first].elapsed_time(self._events[last])
