"""Ctrl-C that waits for a good moment."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Interrupt:
    """Whether the user has asked for an end."""

    requested: bool = False


ENDINGS = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]  # Windows has no terminal to close


def heed_signals() -> None:
    """Let SIGTERM and SIGHUP, the end of a terminal, end a run as Ctrl-C does. `nohup` is respected."""
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in ENDINGS:
            if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, raise_interrupt)


def raise_interrupt(_number: int, _frame: object) -> None:
    """Handler that ends a run as Ctrl-C does, also where a shell has SIGINT ignored."""
    raise KeyboardInterrupt


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP only set `requested`, so that nothing half done is lost.

    A second one raises KeyboardInterrupt. A signal that the caller's environment ignores stays ignored.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def request(_number: int, _frame: object) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDINGS)}
    deferred = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in deferred:
        signal.signal(number, request)
    try:
        yield interrupt
    finally:
        for number in deferred:
            signal.signal(number, before[number])
