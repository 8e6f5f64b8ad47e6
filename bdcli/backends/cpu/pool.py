"""One pool of threads per process, which enter each step side by side and sleep in between.

The caller's thread is one of them; the others wait in compiled code without the interpreter lock: they spin for a
moment, because the next step usually comes soon, and then sleep on a semaphore. Their number honours OMP_NUM_THREADS
and the processors this process may run on (`support.thread_limit`); BDCLI_PIN=1 keeps each on one of them.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading

import numpy as np
from numba import njit, types

from bdcli.backends.cpu.forward import run
from bdcli.backends.cpu.machine.simd import exchange, fetch_add, get_i64, observe, pause, publish, put_i64
from bdcli.backends.cpu.machine.support import processors_to_keep, thread_limit
from bdcli.backends.cpu.machine.threads import wait_for, yield_processor

SPINS = 100_000  # pauses between steps before a thread offers its processor to others; about a millisecond
YIELDS = 200  # offers before it sleeps

# Shared by all, a cache line each; then SLEEPER bytes a thread: whether it sleeps, and its semaphore.
ROUND, LEFT, MODEL, CALL, STOP, SHARED = 0, 64, 128, 192, 256, 320
SLEEPER, SEMAPHORE = 128, 64

semaphore_wait = types.ExternalFunction("sem_wait", types.int32(types.int64))
semaphore_post = types.ExternalFunction("sem_post", types.int32(types.int64))


@njit(nogil=True)
def await_round(shared, me, seen):
    waited = 0
    while observe(shared + ROUND) <= seen:
        waited += 1
        if waited < SPINS:
            pause()
        elif waited < SPINS + YIELDS:
            yield_processor()
        else:
            publish(me, 1)
            if observe(shared + ROUND) <= seen or exchange(me, 0) == 0:  # in the latter case a post is on its way
                semaphore_wait(me + SEMAPHORE)


@njit(nogil=True)
def begin_round(shared, threads):
    fetch_add(shared + ROUND, 1)
    for thread in range(1, threads):
        me = shared + SHARED + SLEEPER * thread
        if exchange(me, 0) == 1:
            semaphore_post(me + SEMAPHORE)


@njit(types.void(types.int64, types.int64), nogil=True, cache=True)
def serve(shared, thread):
    """Body of a pool thread: it joins every step of the pool until STOP is set."""
    me, seen = shared + SHARED + SLEEPER * thread, 0
    while True:
        await_round(shared, me, seen)
        seen += 1
        if observe(shared + STOP) != 0:
            return
        run(get_i64(shared + MODEL), get_i64(shared + CALL), thread)
        fetch_add(shared + LEFT, 1)


@njit(types.void(types.int64, types.int64, types.int64, types.int64), nogil=True, cache=True)
def step(shared, model, call, threads):
    """`forward.run` on all threads; returns when every one of them has left it."""
    if threads == 1:
        run(model, call, 0)
        return
    put_i64(shared + MODEL, model)
    put_i64(shared + CALL, call)
    publish(shared + LEFT, 0)
    begin_round(shared, threads)
    run(model, call, 0)
    wait_for(shared + LEFT, threads - 1)


@njit(types.void(types.int64, types.int64), nogil=True, cache=True)
def publish_stop(shared, threads):
    publish(shared + STOP, 1)
    begin_round(shared, threads)


def _live(shared: int, thread: int, processor: int | None) -> None:
    if processor is not None:
        os.sched_setaffinity(0, {processor})
    serve(shared, thread)


class Pool:
    """Threads for `step`; `run(model, call)` takes addresses of the tables of `bdcli.backends.cpu.tables`."""

    def __init__(self, threads: int):
        self.threads = threads
        self._memory = np.zeros((SHARED + SLEEPER * threads) // 8 + 8, np.int64)
        self._shared = -(-self._memory.ctypes.data // 64) * 64
        libc, processors = ctypes.CDLL(None), processors_to_keep(threads)
        for thread in range(1, threads):
            libc.sem_init(ctypes.c_void_p(self._shared + SHARED + SLEEPER * thread + SEMAPHORE), 0, 0)
            life = self._shared, thread, processors[thread]
            threading.Thread(target=_live, args=life, daemon=True, name=f"bdcli-{thread}").start()

    def run(self, model: int, call: int) -> None:
        step(self._shared, model, call, self.threads)

    def close(self) -> None:
        """End the threads; the pool cannot be used afterwards."""
        if self.threads > 1:
            publish_stop(self._shared, self.threads)
            self.threads = 0


_pool: Pool | None = None


def pool() -> Pool:
    """The process's pool, made at first use."""
    global _pool
    if _pool is None:
        _pool = Pool(thread_limit())
        atexit.register(_pool.close)
    return _pool
