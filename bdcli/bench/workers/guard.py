"""Run a command that ends when its starter does, however that ends.

    python guard.py FD COMMAND...

FD is the reading end of a pipe. Each byte is an order: `p` stops the processes of the command, `r` resumes them. The
end of the pipe, which also comes when the starter is killed, ends them all. The command has a process group of its own
and keeps the standard streams.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

GRACE_S = 3.0  # between asking a command to end and ending it
ORDERS = {b"p": signal.SIGSTOP, b"r": signal.SIGCONT}


def send(group: int, number: int) -> None:
    """A signal to every process of the group; nothing happens where it is empty."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def follow(pipe: int, group: int) -> None:
    """Carry out orders until the pipe ends, then end the group."""
    while order := os.read(pipe, 1):
        send(group, ORDERS[order])
    for number in (signal.SIGTERM, signal.SIGCONT):  # a stopped process ends when it is resumed
        send(group, number)
    time.sleep(GRACE_S)
    send(group, signal.SIGKILL)


def main() -> None:
    pipe, command = int(sys.argv[1]), sys.argv[2:]
    for number in (signal.SIGINT, signal.SIGTERM):  # the pipe alone decides
        signal.signal(number, signal.SIG_IGN)
    try:
        child = subprocess.Popen(command, start_new_session=True, preexec_fn=heed_signals)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")
    threading.Thread(target=follow, args=(pipe, child.pid), daemon=True).start()
    code = child.wait()
    send(child.pid, signal.SIGKILL)  # what it started and left
    sys.stdout.flush()
    os._exit(code if code >= 0 else 128 - code)


def heed_signals() -> None:
    """The command gets the signals that this process ignores."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    main()
