"""Where a store is: a file by its path, which is never read as a URL, or a server by its SQLAlchemy URL."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from platformdirs import user_data_path
from sqlalchemy import URL, make_url

from bdcli.base.errors import UserError
from bdcli.base.files import user_path
from bdcli.base.places import has_home

_URL = re.compile(r"[A-Za-z][\w+.-]*://")


def locate(where: str | None) -> tuple[Path | None, str]:
    """(path, or None of a URL; name for people) of `where`, of BDCLI_DB, or of the store in the user's data folder.

    Raises UserError where none is given and there is no home directory.
    """
    place = where or os.environ.get("BDCLI_DB") or default_place()
    path = None if _URL.match(place) else user_path(place)
    return path, str(path or place)


def default_place() -> str:
    if not has_home() and not os.environ.get("XDG_DATA_HOME"):
        raise UserError("there is no home directory to keep a store in", "Give --db runs.db, or set BDCLI_DB")
    return str(user_data_path("bdcli") / "runs.db")


def file_url(path: Path) -> URL:
    """Of a SQLite file to read and write. Its folder is made. Raises UserError where that cannot be."""
    if path.is_dir():
        raise UserError(f"store {path} is a folder", "Give a file: --db runs.db")
    if not is_writable(path):
        raise UserError(f"store {path} is read-only", "Make it writable, or use another: --db runs.db")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"store {path}: {error.strerror}", "Use another place: --db runs.db") from None
    return URL.create("sqlite", database=str(path.absolute()))


def read_only_url(path: Path) -> URL:
    """Of a SQLite file that nothing is written to or beside."""
    return URL.create(
        "sqlite", database=path.absolute().as_uri(), query={"mode": "ro", "immutable": "1", "uri": "true"}
    )


def file_of(url: str) -> Path | None:
    """The file that a SQLite URL names; None for a server."""
    parsed = make_url(url)
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


def is_writable(path: Path) -> bool:
    """Write bits count even for root, who could ignore them."""
    place = path if path.exists() else path.parent
    if not place.exists():
        return True
    return bool(place.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)) and os.access(place, os.W_OK)
