"""Where machine code is kept between runs."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

from bdcli.base.files import digest


@functools.cache
def code_folder() -> Path:
    """A folder of its own for each version of this package's sources.

    numba looks at the file of a function to see whether its code is stale, not at the files of what it calls.
    """
    from platformdirs import user_cache_path

    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.parent.rglob("*.py")))
    name = f"code-{digest(sources)[:16]}"
    for place in (user_cache_path("bdcli"), Path(tempfile.gettempdir()) / f"bdcli-{os.getuid()}"):
        folder = place / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp(prefix="bdcli-"))
