"""Ctrl-C that waits for a good moment."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


def interrupt(_number: int, _frame: object) -> None:
    """Handler that makes SIGTERM end a run as Ctrl-C does, also where a shell has SIGINT ignored."""
    raise KeyboardInterrupt


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[list]:
    """Inside, Ctrl-C and SIGTERM fill the yielded list instead of raising, so nothing half done is lost.

    A second one raises. A signal that the caller's environment ignores stays ignored.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def note(number: int, _frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    wanted = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in wanted:
        signal.signal(number, note)
    try:
        yield seen
    finally:
        for number in wanted:
            signal.signal(number, before[number])
