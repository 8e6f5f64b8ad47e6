"""What a data source is at present, so that a run which continues notices that it has changed."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

from bdcli.base.files import digest
from bdcli.data.document import Unread
from bdcli.data.files import folder_files
from bdcli.data.sources import split_source


def sources_identity(sources: Sequence[str]) -> str:
    """Digest of the sources' names and, of files, their sizes and times; of `stdlib` it is Python's version."""
    return digest([(source, _state(source)) for source in sources])


def _state(source: str) -> object:
    place = split_source(source)[1]
    path = Path(place).expanduser()
    if place == "stdlib":
        return platform.python_version()
    if path.is_file():
        return _times(path)
    if path.is_dir():
        return [(str(file), *_times(file)) for file in folder_files(path, Unread())]
    return None  # synthetic, or of the hub


def _times(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
