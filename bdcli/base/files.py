"""Files and folders that appear whole or not at all, and the one digest that names what they hold."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import psutil

from bdcli.base.errors import BdcliError, UserError


def digest(value: object) -> str:
    """SHA-256, in hex, of bytes as they are, or of any other value as canonical JSON."""
    if not isinstance(value, bytes):
        value = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(value).hexdigest()


def write_file(path: Path, body: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Write `body`, or what it writes when called with the open file, atomically and on the disk on return."""
    for half in path.parent.glob(f"{glob.escape(path.name)}.*.new"):  # of a process that was killed while it wrote
        process = half.name.split(".")[-2]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            half.unlink(missing_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")  # processes may write the same file at once
    try:
        with fresh.open("wb") as file:
            if callable(body):
                body(file)
            else:
                file.write(body.encode() if isinstance(body, str) else body)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which then takes the place of `path`. What is there already stays until then."""
    fresh = path.with_name(path.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    shutil.rmtree(path, ignore_errors=True)
    fresh.rename(path)


def read_json(path: Path) -> dict:
    """A JSON object that a run wrote. Raises UserError where it is damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path} is damaged", "Restore it, or remove it to make it again") from None


def check_disk_space(folder: Path, needed_bytes: int) -> None:
    """Raise BdcliError when the disk of `folder`, which need not exist yet, has not so many bytes free."""
    info = os.statvfs(next(place for place in (folder, *folder.absolute().parents) if place.exists()))
    free = info.f_bavail * info.f_frsize
    if free < needed_bytes:
        raise BdcliError(
            f"{folder} has {free / 1e9:.1f} GB free, {needed_bytes / 1e9:.1f} GB are needed", "Give another --out"
        )
