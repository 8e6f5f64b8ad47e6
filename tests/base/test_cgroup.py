"""Limits of groups of processes, from trees of files as Linux, containers and old kernels show them."""

import pytest

from bdcli.base import devices
from bdcli.base.cgroup import Limits, read_limits

GIB = 1 << 30


def tree(root, cgroup, mounts, files):
    """A /proc/self and the files of groups below `root`; returns the former."""
    proc = root / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(cgroup)
    lines = (
        f"30 20 0:26 {top} {root}/{place} rw,nosuid shared:4 - {kind} {kind} {options}\n"
        for top, place, kind, options in mounts
    )
    (proc / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda rw\n" + "".join(lines))
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return proc


V2 = [("/", "fs", "cgroup2", "rw,nsdelegate")]
V1 = [("/", "cpu", "cgroup", "rw,cpu,cpuacct"), ("/", "mem", "cgroup", "rw,memory")]
DOCKER_V1 = [("/docker/1f", "cpu", "cgroup", "rw,cpu"), ("/docker/1f", "mem", "cgroup", "rw,memory")]

CASES = {
    "no groups": ("", [], {}, Limits()),
    "v2 without limits": (
        "0::/a\n",
        V2,
        {"fs/a/cpu.max": "max 100000\n", "fs/a/memory.max": "max\n", "fs/a/memory.current": "5\n"},
        Limits(),
    ),
    "v2 of this group": ("0::/a/b\n", V2, {"fs/a/b/cpu.max": "150000 100000\n"}, Limits(1.5)),
    "v2 of a parent is the tighter one": (
        "0::/a/b\n",
        V2,
        {"fs/a/cpu.max": "50000 100000", "fs/a/b/cpu.max": "400000 100000"},
        Limits(0.5),
    ),
    "v2 inside a namespace": (
        "0::/\n",
        V2,
        {
            "fs/memory.max": str(4 * GIB),
            "fs/memory.current": str(3 * GIB),
            "fs/memory.stat": f"anon 7\ninactive_file {GIB}\nactive_file 5\n",
        },
        Limits(None, 2 * GIB),
    ),
    "v2 memory.high below max": (
        "0::/a\n",
        V2,
        {"fs/a/memory.max": str(4 * GIB), "fs/a/memory.high": str(GIB), "fs/a/memory.current": str(2 * GIB)},
        Limits(None, 0),
    ),
    "v2 memory of a parent": (
        "0::/a/b\n",
        V2,
        {
            "fs/a/memory.max": str(GIB),
            "fs/a/memory.current": str(GIB // 2),
            "fs/a/b/memory.max": str(3 * GIB),
            "fs/a/b/memory.current": "0",
        },
        Limits(None, GIB // 2),
    ),
    "v1": (
        "4:memory:/x\n3:cpu,cpuacct:/x\n1:name=systemd:/\n0::/\n",
        V1,
        {
            "cpu/x/cpu.cfs_quota_us": "250000\n",
            "cpu/x/cpu.cfs_period_us": "100000\n",
            "mem/x/memory.limit_in_bytes": str(GIB),
            "mem/x/memory.usage_in_bytes": str(GIB // 4),
            "mem/x/memory.stat": f"total_inactive_file {GIB // 8}\n",
        },
        Limits(2.5, GIB - GIB // 8),
    ),
    "v1 without limits": (
        "4:memory:/x\n3:cpu:/x\n",
        V1,
        {
            "cpu/x/cpu.cfs_quota_us": "-1\n",
            "cpu/x/cpu.cfs_period_us": "100000\n",
            "mem/x/memory.limit_in_bytes": "9223372036854771712",
        },
        Limits(),
    ),
    "v1 in docker, whose mount begins at its group": (
        "4:memory:/docker/1f\n3:cpu:/docker/1f\n",
        DOCKER_V1,
        {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000", "mem/memory.limit_in_bytes": str(GIB)},
        Limits(2.0, GIB),
    ),
    "lines that say nothing": ("0::/a\n", V2, {"fs/a/cpu.max": "\n", "fs/a/memory.max": "lots"}, Limits()),
}


@pytest.mark.parametrize("case", CASES)
def test_limits_are_those_of_the_tightest_group(case, tmp_path):
    cgroup, mounts, files, wanted = CASES[case]
    assert read_limits(tree(tmp_path, cgroup, mounts, files)) == wanted


@pytest.mark.parametrize(
    ("cpus", "setting", "threads"),
    [
        (None, "", 4),
        (4.0, "", 4),
        (3.9, "", 3),
        (1.5, "", 1),
        (0.5, "", 1),
        (16.0, "", 4),
        (2.0, "3", 2),
        (None, "1", 1),
    ]
    + [(None, given, wanted) for given, wanted in (("2", 2), ("9", 4), ("3,2", 3), ("0", 4), ("x", 4))],
)
def test_threads_fit_into_the_quota(cpus, setting, threads, monkeypatch):
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setattr(devices, "read_limits", lambda: Limits(cpus))
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    assert devices.thread_limit() == threads


def test_torch_uses_no_more_threads_than_it_may(monkeypatch):
    used = []
    monkeypatch.setattr(devices.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(devices.torch, "set_num_threads", used.append)
    monkeypatch.setattr(devices, "thread_limit", lambda: 3)
    assert devices.pick_device("cpu").type == "cpu" and used == [3]


def test_memory_is_what_the_tightest_bound_leaves(monkeypatch):
    class Memory:
        available = 8 * GIB

    cpu = devices.torch.device("cpu")
    monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: Memory)
    for limits, spaces, wanted in [
        (None, [], 8 * GIB),
        (2 * GIB, [], 2 * GIB),
        (20 * GIB, [], 8 * GIB),
        (2 * GIB, [GIB], GIB),
        (None, [-5], 0),
    ]:
        monkeypatch.setattr(devices, "read_limits", lambda limits=limits: Limits(None, limits))
        monkeypatch.setattr(devices, "_address_space", lambda spaces=spaces: iter(spaces))
        assert devices.free_memory(cpu) == wanted
