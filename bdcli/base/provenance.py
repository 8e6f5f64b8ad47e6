"""What a figure was measured on: machine, package versions, revision of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import psutil

from bdcli import __version__

PACKAGES = ("torch", "triton", "transformers", "safetensors")


def machine() -> str:
    """Processor, cores and memory, the way a person would name the machine."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line)
        name = next(lines, name)
    return f"{name}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.system()}"


def versions() -> dict[str, str]:
    found = {"bdcli": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Commit of the checkout this package runs from, with + when it has changes; None outside one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=False)
        return done.stdout.strip()

    try:
        revision = git("rev-parse", "--short=12", "HEAD")
        return (revision + ("+" if git("status", "--porcelain", "-uno") else "")) or None
    except (OSError, subprocess.SubprocessError):
        return None
