"""Processes of other tools: started by us, stopped while they are not measured, and never left behind.

A tool runs under `workers/guard.py`, which ends it when this process closes a pipe or is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from bdcli.base.errors import BdcliError

WORKERS = Path(__file__).parent / "workers"
END_S = 10.0  # that a process gets to end by itself when its input is closed
LOG_CHARACTERS = 200  # of the last line of a log that stand in an error


class PeerError(BdcliError):
    """Another tool failed, died, or did not answer in time."""


class GuardedProcess:
    """A command with pipes for input and output and a log for its errors.

    It is stopped between `pause` and `resume`, so that a tool that spins while it waits takes no time from others.
    """

    def __init__(self, name: str, command: list[str], env: dict[str, str] | None = None):
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        orders, self._lifeline = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, str(WORKERS / "guard.py"), str(orders), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=os.environ | (env or {}),
                pass_fds=(orders,),
                start_new_session=True,  # Ctrl-C ends a sweep after the running arm, which it must not break
            )
        finally:
            os.close(orders)
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=self._collect, daemon=True).start()

    def _collect(self) -> None:
        """Hand over the lines of its output; it must never wait for us to read them."""
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def pause(self) -> None:
        """Stop it where it is."""
        self._order(b"p")

    def resume(self) -> None:
        """Let it continue."""
        self._order(b"r")

    def _order(self, order: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._lifeline, order)

    def send(self, message: dict) -> None:
        """One JSON line to its input. Raises PeerError where it has ended."""
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self.death() from None

    def receive(self, patience_s: float) -> dict:
        """The next JSON line of its output. Raises PeerError where it ended, is silent, or reports an error."""
        try:
            line = self._lines.get(timeout=patience_s)
        except queue.Empty:
            raise PeerError(f"{self.name} did not answer within {patience_s:g} s") from None
        if line is None:
            raise self.death()
        try:
            message = json.loads(line)
        except json.JSONDecodeError:
            raise PeerError(f"{self.name} answered {line[:LOG_CHARACTERS]!r}") from None
        if "error" in message:
            raise PeerError(f"{self.name}: {message['error']}")
        return message

    def finish(self, patience_s: float) -> None:
        """Until it has done its work. Raises PeerError where it fails, or takes longer."""
        wait_until(lambda: not self.alive, self, patience_s)
        if self._process.returncode:
            raise self.death()

    def death(self) -> PeerError:
        """That it has ended, with its exit code and the last line of its log."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        code = self._process.returncode
        what = "ended its answer early" if code is None else f"ended with exit code {code}"
        return PeerError(f"{self.name} {what}{self.last_words()}")

    def last_words(self) -> str:
        """`: ` and the last line that it logged; empty where it logged nothing."""
        if self._log.closed:
            return ""
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return f": {lines[-1][-LOG_CHARACTERS:]}" if lines else ""

    def close(self) -> None:
        """End it and everything it started."""
        self.resume()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        os.close(self._lifeline)
        self._process.wait()
        self._log.close()


def wait_until(ready, process: GuardedProcess, patience_s: float) -> None:
    """Until `ready()` is true. Raises PeerError where the process ends before, or it takes longer."""
    until = time.monotonic() + patience_s
    while not ready():
        if not process.alive:
            raise process.death()
        if time.monotonic() > until:
            raise PeerError(f"{process.name} was not ready within {patience_s:g} s{process.last_words()}")
        time.sleep(0.1)
