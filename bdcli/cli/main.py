"""The command line: its commands, its entry point, and errors as one line and an exit code."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bdcli import __version__
from bdcli.base.console import note, say_error
from bdcli.base.errors import INTERRUPTED, BdcliError
from bdcli.base.files import explain
from bdcli.base.interrupt import heed_signals
from bdcli.base.places import prepare_caches
from bdcli.base.streams import check_output, prepare_streams, write_line
from bdcli.cli.bench import bench
from bdcli.cli.decode import decode
from bdcli.cli.report import report
from bdcli.cli.tools import convert, doctor, fetch, prompt
from bdcli.cli.train import distill, prepare, pretrain

app = typer.Typer(
    name="bdcli",
    help="Lossless speculative decoding for long contexts with a drafter inside a fixed KV budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        write_line(f"bdcli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    app.debug = debug


for command in (decode, report, prompt, fetch, convert, doctor, bench, prepare, pretrain, distill):
    app.command()(command)


def main() -> None:
    """Entry point: every expected error is one line on stderr and an exit code."""
    prepare_streams()
    prepare_caches()
    heed_signals()
    app.debug = False
    try:
        code = typer.main.get_command(app).main(standalone_mode=False)
        sys.stdout.flush()
        check_output()
    except KeyboardInterrupt:
        note("interrupted")
        code = INTERRUPTED
    except Exception as error:
        if app.debug:
            raise
        code = _say(error)
    sys.exit(code if isinstance(code, int) else 0)


def _say(error: Exception) -> int:
    """An error as one line, and the exit code."""
    known = explain(error) if isinstance(error, OSError) else error
    if isinstance(known, BdcliError):
        return say_error(known)
    usage = hasattr(error, "format_message")  # click's own errors, whose module typer may vendor
    message = " ".join((error.format_message() if usage else f"{type(error).__name__}: {error}").split())
    note(f"error: {message}. " + ("See bdcli --help" if usage else "Run again with bdcli --debug for the traceback"))
    return getattr(error, "exit_code", 1) if usage else 1
