"""Folders of this user that can be written, where there is a home directory and where there is none."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bdcli.base.errors import UserError
from bdcli.base.streams import printable

# What libraries put below a home directory; without one some would make a folder named ~ here, others fail.
LIBRARY_CACHES = {
    "HF_HOME": "huggingface",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "MPLCONFIGDIR": "matplotlib",
}


def has_home() -> bool:
    return os.path.isabs(os.path.expanduser("~"))  # noqa: PTH111, PTH117  (Path raises, and an empty HOME is none)


def prepare_caches() -> None:
    """Give libraries a place for their caches where this user has no home directory."""
    if has_home():
        return
    own = temporary_folder()
    for variable, name in LIBRARY_CACHES.items() if own is not None else ():
        os.environ.setdefault(variable, str(own / name))


def cache_folders() -> Iterator[Path]:
    """Folders for what can be made again, the best first; each is there and can be written."""
    from platformdirs import user_cache_path

    if has_home() or os.environ.get("XDG_CACHE_HOME"):
        folder = user_cache_path("bdcli")
        if _is_usable(folder):
            yield folder
    own = temporary_folder()
    if own is not None:
        yield own


def temporary_folder() -> Path | None:
    """This user's own folder among temporary files; None where none can be made, or another user made it."""
    name = f"bdcli-{os.getuid()}" if hasattr(os, "getuid") else "bdcli"
    try:
        folder = Path(tempfile.gettempdir()) / name
    except FileNotFoundError:
        return None
    if not _is_usable(folder) or (hasattr(os, "getuid") and folder.stat().st_uid != os.getuid()):
        return None
    return folder


@functools.cache
def readable_folder(folder: Path) -> Path:
    """`folder`, or a link to it where its path has bytes that are no UTF-8: libraries in Rust cannot open those.

    The link stays for as long as this process runs. Raises UserError where none can be made.
    """
    if printable(str(folder)) == str(folder):
        return folder
    try:
        link = Path(tempfile.mkdtemp(prefix="bdcli-")) / "folder"
        link.symlink_to(folder.absolute(), target_is_directory=True)
    except OSError:
        raise UserError(f"{folder}: its name is not UTF-8", "Rename the folder") from None
    atexit.register(shutil.rmtree, link.parent, ignore_errors=True)
    return link


def _is_usable(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
