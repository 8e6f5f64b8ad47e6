"""What would bite a run on this machine: quotas, limits, places that cannot be written, disks and terminals.

Each function returns what it found and raises BdcliError where a run would fail or lose something.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import torch

from bdcli.base.cgroup import read_limits
from bdcli.base.devices import HOST_RUNTIME_BYTES, free_memory, resident_memory, thread_limit
from bdcli.base.errors import BdcliError
from bdcli.base.files import disk_size, disk_space
from bdcli.base.places import cache_folders, has_home
from bdcli.model.sizes import gigabytes
from bdcli.results.location import locate

LEAST_DISK_BYTES = 100 << 20  # of the store, beyond which a text may find no place
NETWORK_DISKS = ("nfs", "cifs", "smb", "sshfs", "9p", "lustre", "gpfs", "beegfs", "afs", "ceph", "glusterfs")


def threads() -> str:
    """Threads, and what bounds them."""
    quota, here = read_limits().cpus, os.cpu_count() or 1
    bound = "" if quota is None else f", a CPU quota of {quota:.1f} processors"
    return f"{thread_limit()} of {here} processors{bound}; torch uses {torch.get_num_threads()}"


def memory() -> str:
    """Memory of the machine, and what the limits of this process leave of it."""
    machine, free = psutil.virtual_memory(), free_memory(torch.device("cpu"))
    found = f"{gigabytes(machine.available)} of {gigabytes(machine.total)} free"
    if free < machine.available:
        found += f", limited to {gigabytes(free)} (a group of processes or ulimit)"
    if free + resident_memory() < HOST_RUNTIME_BYTES:
        raise BdcliError(f"{found}: less than Python and its libraries take", "Raise the limit")
    return found


def places() -> str:
    """Where compiled code is kept."""
    folder = next(cache_folders(), None)
    if folder is None:
        raise BdcliError("no folder for compiled code can be written", "Set XDG_CACHE_HOME, or TMPDIR")
    return f"cache {folder}{'' if has_home() else '; there is no home directory, so give --db'}"


def disk(where: str | None) -> str:
    """Space beside the store, and whether its disk is one on which SQLite is safe."""
    path, name = locate(where)
    if path is None:
        return f"{name} is a server or a URL"
    free, kind = disk_space(path.parent), _file_system(path.absolute().parent)
    found = f"{disk_size(free)} free beside the store, {kind}"
    if free < LEAST_DISK_BYTES:
        raise BdcliError(f"{found}: soon no row can be written", "Free some space, or give --db")
    if any(kind.startswith((name, f"fuse.{name}")) for name in NETWORK_DISKS):
        raise BdcliError(
            f"{found}: processes of several machines would damage a SQLite file there", "Give --db a local file"
        )
    return found


def terminal() -> str:
    """Encoding of stdout."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    lossy = encoding.lower().replace("-", "").replace("_", "") != "utf8"
    return f"{encoding}: other characters are shown as ?, --json escapes them" if lossy else encoding


def _file_system(folder: Path) -> str:
    """Type of the file system that a folder, which need not exist yet, is on."""
    mounts = {}
    for part in psutil.disk_partitions(all=True):
        mounts[Path(part.mountpoint)] = part.fstype
    return next((mounts[place] for place in (folder, *folder.parents) if place in mounts), "unknown file system")
