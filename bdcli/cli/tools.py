"""The commands `prompt`, `fetch`, `convert` and `doctor`. Heavy imports wait inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bdcli.base.console import note, status_line
from bdcli.base.errors import UserError
from bdcli.base.streams import write_exactly, write_json, write_line
from bdcli.cli.flags import MODEL_HELP, DbOption, JsonOption
from bdcli.config.decode import DecodeOptions, parse_context
from bdcli.model.known import KNOWN

DEFAULT = DecodeOptions()


def prompt(
    ctx: Annotated[str, typer.Option(help="Length in tokens: 4k or 4096.")] = "4k",
    source: Annotated[str, typer.Option(help="stdlib (Python's own sources) or a text file.")] = "stdlib",
    out: Annotated[Path | None, typer.Option(help="File to write; stdout without it.")] = None,
    target: Annotated[str, typer.Option(help=f"Whose tokenizer counts. {MODEL_HELP}")] = DEFAULT.target,
) -> None:
    """Write a real prompt of exactly that many tokens."""
    from bdcli.data.prompts import cut_prompt, read_prompt, stdlib_text

    tokens = parse_context(ctx)
    text = stdlib_text() if source == "stdlib" else read_prompt(source)
    from bdcli.model.hub import resolve
    from bdcli.model.tokenizer import load_tokenizer

    piece = cut_prompt(load_tokenizer(resolve(target, "target")), text, tokens)
    if out is None:
        write_exactly(piece)
        return
    try:
        out.write_text(piece, "utf-8", newline="")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}", "Give a path in an existing folder") from None
    note(f"wrote {out}: {tokens} tokens, {len(piece)} characters")


def fetch(model: Annotated[str, typer.Argument(help=f"Its name: {', '.join(KNOWN)}.")]) -> None:
    """Download a known model with pip and check it; a model that is there already is left as it is."""
    from bdcli.model.known import fetch as download

    with status_line(f"downloading {model}"):
        path, downloaded = download(model)
    note(f"{'fetched' if downloaded else 'already here:'} {KNOWN[model].what}, {KNOWN[model].licence}")
    typer.echo(path)


def convert(
    model: Annotated[str, typer.Argument(help="GGUF file, or folder or hub name of a model with .bin weights.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
) -> None:
    """Write a GGUF file or a .bin checkpoint as safetensors; .bin files that hold more than tensors are refused."""
    with status_line("converting"):
        from bdcli.model.convert import convert as write_folder

        write_folder(model, out)
    write_line(out)


def doctor(db: DbOption = None, as_json: JsonOption = False) -> None:
    """Check this machine, the store and the pocket pair."""
    with status_line("checking"):
        from bdcli.cli.doctor import checks

        found = list(checks(db))
    if as_json:
        write_json({c.name: {"ok": c.ok, "detail": c.detail} for c in found})
    else:
        for c in found:
            write_line(f"{'ok  ' if c.ok else 'FAIL'}  {c.name:12} {c.detail}")
    if not all(c.ok for c in found):
        raise typer.Exit(1)
