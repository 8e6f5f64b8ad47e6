"""Where machine code is kept between runs."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from bdcli.base.errors import BdcliError
from bdcli.base.files import digest, disk_space
from bdcli.base.places import cache_folders

CODE_BYTES = 32 << 20  # free space that compiled code may need


@functools.cache
def code_folder() -> Path:
    """A folder of its own for each version of this package's sources. Raises BdcliError where there is none.

    numba looks at the file of a function to see whether its code is stale, not at the files of what it calls.
    """
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.parent.rglob("*.py")))
    name = f"code-{digest(sources)[:16]}"
    for place in cache_folders():
        folder = place / name
        try:
            folder.mkdir(exist_ok=True)
            kept = any(folder.rglob("*.nbc"))
        except OSError:
            continue
        if os.access(folder, os.W_OK) and (kept or disk_space(folder) >= CODE_BYTES):
            return folder
    raise BdcliError("there is no folder for compiled code", "Set XDG_CACHE_HOME, or give --engine torch")
