"""Options and exit codes that commands share."""

from __future__ import annotations

from typing import Annotated

import typer

DbOption = Annotated[
    str, typer.Option("--db", help="Store: a file or SQLAlchemy URL. [default: BDCLI_DB or user data]")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
