"""Files and folders that appear whole or not at all, and the one digest that names what they hold."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import psutil

from bdcli.base.errors import BdcliError, UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
# what somebody gave cannot be used as it is, and nothing was done yet
UNUSABLE = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL,
)  # fmt: skip
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")  # how safetensors and tokenizers say it


def explain(error: Exception, path: Path | str | None = None) -> BdcliError | None:
    """An error of the operating system as one line with the path, or None where it is something else.

    A full disk ends a run (exit code 1); a path that cannot be used is bad input (2).
    """
    number = getattr(error, "errno", None)
    if number is None and (found := _RUST_ERRNO.search(str(error))):
        number = int(found[1])
    if number is None:
        return None
    where, reason = path or getattr(error, "filename", None) or "a file", os.strerror(number)
    if number in FULL:
        return BdcliError(f"{where}: {reason}", "Free some space and run it again; what was complete is kept")
    if number in UNUSABLE:
        return UserError(f"{where}: {reason}", "Give another path, or make it usable")
    return BdcliError(f"{where}: {reason}", "Check the disk and run it again; what was complete is kept")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Inside, errors of the operating system become one line with `path`."""
    try:
        yield
    except BdcliError:
        raise
    except Exception as error:
        known = explain(error, path) or explain(error.__context__ or error, path)
        if known is None:
            raise
        raise known from error


def make_folder(path: Path) -> None:
    """Make a folder and its parents where they are missing. Raises as `write_file` does."""
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)


def user_path(text: str) -> Path:
    """The path that a user means, with ~ replaced. Raises UserError where there is no such home."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: there is no such home directory", "Give the whole path") from None


def digest(value: object) -> str:
    """SHA-256, in hex, of bytes as they are, or of any other value as canonical JSON."""
    if not isinstance(value, bytes):
        value = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(value).hexdigest()


def write_file(path: Path, body: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Write `body`, or what it writes when called with the open file, atomically and on the disk on return.

    Raises BdcliError with the path where the disk is full, UserError where it cannot be written at all.
    """
    with explained(path):
        _write_file(path, body)


def _write_file(path: Path, body: str | bytes | Callable[[BinaryIO], object]) -> None:
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
    """A folder to fill, which then takes the place of `path`. What is there already stays until then.

    Raises as `write_file` does, for what fails while it is filled as well; nothing half done is left.
    """
    fresh = path.with_name(path.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        with explained(path):
            fresh.mkdir(parents=True)
            yield fresh
            shutil.rmtree(path, ignore_errors=True)
            fresh.rename(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def read_json(path: Path) -> dict:
    """A JSON object that a run wrote. Raises UserError where it is damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path} is damaged", "Restore it, or remove it to make it again") from None


def check_disk_space(folder: Path, needed_bytes: int) -> None:
    """Raise BdcliError when the disk of `folder`, which need not exist yet, has not so many bytes free."""
    free = disk_space(folder)
    if free < needed_bytes:
        raise BdcliError(
            f"{folder} has {disk_size(free)} free, {disk_size(needed_bytes)} are needed", "Give another --out"
        )


def disk_space(folder: Path) -> int:
    """Bytes that this user may still write to the disk of `folder`, which need not exist yet."""
    with explained(folder):
        info = os.statvfs(next(place for place in (folder, *folder.absolute().parents) if place.exists()))
    return info.f_bavail * info.f_frsize


def disk_size(count: float) -> str:
    """For people: GB from 1 GB on, else MB, never 0 of something."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{math.ceil(count / 1e6)} MB"
