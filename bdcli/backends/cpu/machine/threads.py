"""How threads inside a step meet: a barrier, and tasks that they claim one by one; and work on torch's threads.

A thread that waits spins for a while and then offers its processor to others, so that a busy neighbour slows a step
down by its share and not by a time slice at each barrier.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from pathlib import Path

from numba import njit, types

from bdcli.backends.cpu import tables
from bdcli.backends.cpu.machine.simd import entries, fetch_add, observe, pause, publish
from bdcli.backends.cpu.tables import field

PATIENCE = 3000  # pauses at a barrier before the processor is offered to others; some 0.1 ms

yield_processor = types.ExternalFunction("sched_yield", types.int32())


@njit(error_model="numpy")
def wait_for(address, at_least):
    """Until the value at `address` has come up to `at_least`."""
    spins = 0
    while observe(address) < at_least:
        spins += 1
        pause()
        if spins > PATIENCE:
            yield_processor()


@njit(error_model="numpy")
def barrier(call, thread, phase):
    """All threads have ended phase `phase`; returns the next. Tasks of the next phase are unclaimed."""
    threads = field(call, tables.THREADS)
    if threads > 1:
        fetch_add(field(call, tables.ARRIVED), 1)
        wait_for(field(call, tables.ARRIVED), threads * (phase + 1))
    if thread == 0:  # of the three counters the one that nobody claims from any more, and nobody does yet
        publish(field(call, tables.CLAIMS) + 64 * ((phase + 2) % 3), 0)
    return phase + 1


@njit(error_model="numpy")
def claim(call, phase):
    """The next task of the phase, from 0; its number is for the caller to bound."""
    return fetch_add(field(call, tables.CLAIMS) + 64 * (phase % 3), 1)


@functools.cache
def _parallel():
    """GNU OpenMP's call of a function on all its threads; None where torch uses another library."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if "libgomp" in path.rsplit("/", 1)[-1]:
            return ctypes.CDLL(path).GOMP_parallel
    return None


def run_on_torch_threads(entry: str, job: int, threads: int) -> None:
    """Call the compiled function `entry`(job) on that many of torch's threads; `job` is an address.

    torch's threads spin for milliseconds after each of its operations, and any others would have to share processors
    with them.
    """
    address, parallel = entries[entry].address, _parallel()
    if parallel is not None:
        parallel(ctypes.c_void_p(address), ctypes.c_void_p(job), threads, 0)
        return
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
    others = [threading.Thread(target=call, args=(job,)) for _ in range(threads - 1)]
    for thread in others:
        thread.start()
    call(job)
    for thread in others:
        thread.join()
