"""Options and exit codes that commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from bdcli.model.known import KNOWN

MODEL_HELP = f"Folder, GGUF file, hub name, {', '.join(('pocket', *KNOWN))}."
DbOption = Annotated[
    str, typer.Option("--db", help="Store: a file or SQLAlchemy URL. [default: BDCLI_DB or user data]")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
