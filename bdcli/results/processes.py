"""Who computes a run: whether the process of a row that was left running still works."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil

from bdcli.results.schema import Run

CLOCK_TOLERANCE_S = 2  # of starts by the clock, which steps when it is set


def this_process() -> dict[str, object]:
    """Columns of a run that this process computes."""
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "pid": process.pid,
        "process_started": process.create_time(),
        "process_identity": _identity(process.pid),
    }


def is_alive(run: Run) -> bool | None:
    """Whether the process that computes this row is there. None: it belongs to a machine or container not seen from
    here, and nobody here can know.
    """
    if run.pid is None:
        return False
    if run.process_identity is None or (here := _place()) is None:  # of an older version, or no Linux
        return _started_then(run) if run.host == socket.gethostname() else None
    place, _, _ticks = run.process_identity.rpartition("/")
    if place == here:
        return _identity(run.pid) == run.process_identity
    same_boot = place.partition("/")[0] == here.partition("/")[0]
    return False if run.host == socket.gethostname() and not same_boot else None  # this machine was started again


def computed_elsewhere(run: Run) -> bool:
    """Whether another living process computes this row."""
    return run.status == "running" and bool(is_alive(run)) and run.pid != os.getpid()


def mark_unknown(runs: list[Run]) -> list[Run]:
    """The runs; the status of one that may have died where nobody here can see it has a question mark."""
    for run in runs:
        if run.status == "running" and is_alive(run) is None:
            run.status = "running?"
    return runs


def _place() -> str | None:
    """Boot and PID namespace, within which a PID and a start in clock ticks name one process; None off Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return None


def _identity(pid: int) -> str | None:
    """Place, and start in clock ticks since boot, which no change of the clock moves; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    place = _place()
    dead = fields[0] in "ZX"  # ended, and its parent has not asked yet
    return None if place is None or dead else f"{place}/{fields[19]}"


def _started_then(run: Run) -> bool:
    try:
        started = psutil.Process(run.pid).create_time()
    except psutil.Error:
        return False
    return abs(started - (run.process_started or 0)) < CLOCK_TOLERANCE_S
