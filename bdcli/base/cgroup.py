"""Limits that Linux sets for this process's group of processes, as containers and CI do: CPU time and memory.

cgroup v2 keeps them in cpu.max, memory.max and memory.high, v1 in cpu.cfs_quota_us and memory.limit_in_bytes. The
limit of a group also binds the groups below it, so every level from this process's group up is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NO_LIMIT = 1 << 60  # bytes; v1 gives the largest number of pages where there is none
PROC = Path("/proc/self")


@dataclass(frozen=True)
class Limits:
    """cpus: processors' worth of time. memory: bytes that may still be used; None where nothing limits them."""

    cpus: float | None = None
    memory: int | None = None


def read_limits(proc: Path = PROC) -> Limits:
    """The tightest limits of the groups that this process is in. A file that cannot be read limits nothing."""
    cpus, memory = [], []
    for group, version in _groups(proc):
        cpus.append(_cpus(group, version))
        memory.append(_memory(group, version))
    return Limits(_least(cpus), _least(memory))


def _least(values: list) -> float | int | None:
    return min((value for value in values if value is not None), default=None)


def _groups(proc: Path) -> Iterator[tuple[Path, int]]:
    """(folder, version) of every group this process is in, for each hierarchy from its own group to the top."""
    paths = {}  # by controller of v1, and "" for v2
    for line in _lines(proc / "cgroup"):
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    for line in _lines(proc / "mountinfo"):
        mount, _, system = line.partition(" - ")
        kind, *_, options = system.split()
        root, place = (_unescaped(word) for word in mount.split()[3:5])
        if kind == "cgroup2":
            path, version = paths.get(""), 2
        elif kind == "cgroup":
            known = [name for name in options.split(",") if name in ("cpu", "memory") and name in paths]
            path, version = (paths[known[0]], 1) if known else (None, 1)
        else:
            continue
        if path is None:
            continue
        top = Path(place)
        below = path.removeprefix(root) if path == root or path.startswith(root.rstrip("/") + "/") else ""
        group = top / below.strip("/")
        while True:  # a container sees its group as the top where it has a namespace of groups
            yield group, version
            if group == top:
                break
            group = group.parent


def _unescaped(word: str) -> str:
    return word.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")


def _cpus(group: Path, version: int) -> float | None:
    if version == 2:
        quota, period = [*_words(group / "cpu.max"), "", ""][:2]
    else:
        quota, period = (next(iter(_words(group / f"cpu.cfs_{name}_us")), "") for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _memory(group: Path, version: int) -> int | None:
    """What is left below the limit; file pages that are not in use are given back when memory is short."""
    names = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
    limit = _least([number for name in names if (number := _number(group / name)) is not None])
    if limit is None or limit >= NO_LIMIT:
        return None
    used = _number(group / ("memory.current" if version == 2 else "memory.usage_in_bytes")) or 0
    statistics = dict(line.split()[:2] for line in _lines(group / "memory.stat") if len(line.split()) > 1)
    unused = statistics.get("inactive_file" if version == 2 else "total_inactive_file", "0")
    return max(0, limit - max(0, used - int(unused)))


def _number(path: Path) -> int | None:
    word = next(iter(_words(path)), "")
    return int(word) if word.isdigit() else None


def _words(path: Path) -> list[str]:
    return next(iter(_lines(path)), "").split()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return []
