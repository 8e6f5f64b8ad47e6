"""Digests of large files, each computed once: they are kept by path, size and times in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from bdcli.base.files import write_file

CACHED_BYTES = 2**20  # smaller files are digested each time
KEPT_DIGESTS = 2000


def file_digest(path: Path) -> str:
    """SHA-256, in hex, of all bytes of a file."""
    stat = path.stat()
    if stat.st_size < CACHED_BYTES:
        return _digest(path)
    name, state = str(path.resolve()), [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    store = _store()
    known = _read(store).get(name)
    if known is not None and known[:-1] == state:
        return known[-1]
    found = _digest(path)
    if store is not None:
        rest = {key: value for key, value in _read(store).items() if key != name}  # as others have left it by now
        last = list(rest.items())[1 - KEPT_DIGESTS :]
        try:
            store.parent.mkdir(parents=True, exist_ok=True)
            write_file(store, json.dumps(dict(last) | {name: [*state, found]}))
        except OSError:
            pass  # a cache that cannot be written costs time only
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _store() -> Path | None:
    """The file of known digests; None where this user has no home."""
    from platformdirs import user_cache_path

    try:
        return user_cache_path("bdcli") / "digests.json"
    except (RuntimeError, OSError):
        return None


def _read(store: Path | None) -> dict[str, list]:
    try:
        known = json.loads(store.read_text("utf-8")) if store is not None else {}
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
