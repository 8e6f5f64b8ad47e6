"""What people see: notes and progress on stderr, tables on stdout. Rich is imported when something is drawn."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from pathlib import Path
from typing import NoReturn, Self

import typer

from bdcli.base.errors import INTERRUPTED, BdcliError, OutputError
from bdcli.base.interrupt import heed_signals
from bdcli.base.places import prepare_caches
from bdcli.base.progress import Progress
from bdcli.base.streams import check_output, prepare_streams

QUIET_S = 60  # longest silence of a phase where no bar can be drawn


def note(line: str) -> None:
    print(f"bdcli: {line}", file=sys.stderr)


def as_typed(*more: str) -> str:
    """This process's command line, with the words of `more` that it lacks."""
    place = Path(sys.argv[0])
    start = ["python", sys.argv[0]] if place.suffix == ".py" and place.stem != "__main__" else ["bdcli"]
    return shlex.join([*start, *sys.argv[1:], *(word for word in more if word not in sys.argv)])


def end_interrupted(*more: str, where: str = "") -> NoReturn:
    """Say how to continue and exit: with this command line and the words of `more`."""
    note(f"interrupted{where}; continue with: {as_typed(*more)}")
    raise typer.Exit(INTERRUPTED)


def run_script(app) -> None:
    """Run the commands of a script: an expected error is one line and an exit code, as for `bdcli`."""
    prepare_streams()
    prepare_caches()
    heed_signals()
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
        check_output()
    except BdcliError as error:
        code = say_error(error)
    sys.exit(code or 0)


def say_error(error: BdcliError) -> int:
    """An expected error as one line, and its exit code."""
    if not (isinstance(error, OutputError) and error.quiet):
        note(f"error: {error}")
    return error.exit_code


@contextlib.contextmanager
def status_line(what: str):
    """A spinner on an interactive stderr."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


class ConsoleProgress(Progress):
    """Bars with an ETA on an interactive stderr, elsewhere a line now and then, while it is entered.

    `lines` off: no lines. `transient`: the bars disappear at the end. `resumable`: Ctrl-C says how to resume and exits.
    Subclasses in `bdcli.cli.output` show text and figures.
    """

    def __init__(self, *, lines: bool = True, transient: bool = False, resumable: bool = False):
        self.interactive = sys.stderr.isatty()
        self._lines, self._transient, self._resumable = lines, transient, resumable
        self._live = self._bars = None
        self._tasks: dict[str, int] = {}
        self._printed: dict[str, tuple[int, float]] = {}  # tenth and moment of the last line of a phase

    def __enter__(self) -> Self:
        if self.interactive:
            self._open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if self._resumable and kind is not None and issubclass(kind, KeyboardInterrupt):
            end_interrupted()

    def close(self) -> None:
        """Stop drawing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, line: str) -> None:
        note(line)

    def advance(self, phase: str, done: float, total: float, detail: str = "") -> None:
        """Also see the base class. A total of 1 is shown in percent."""
        amount = f"{done:.0%}" if total == 1 else f"{done} of {total}"
        if self._live is not None:
            if phase not in self._tasks:
                self._tasks[phase] = self._bars.add_task(phase, total=total)
            self._bars.update(self._tasks[phase], completed=done, amount=amount, detail=detail)
        elif self._lines and not self.interactive:
            tenth, now = int(10 * done // total), time.monotonic()
            before = self._printed.setdefault(phase, (0, now))
            if tenth > before[0] or now - before[1] > QUIET_S:
                note(f"{phase}: {amount} {detail}")
                self._printed[phase] = tenth, now

    def show_above(self, drawing: object) -> None:
        """Draw something of rich above the bars, in place of what was there."""
        from rich.console import Group

        if self._live is not None:
            self._live.update(Group(drawing, self._bars))

    @property
    def width(self) -> int:
        """Columns of the terminal that is drawn on."""
        return self._live.console.width

    def _open(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        texts = [TextColumn(f"{{task.{field}}}") for field in ("description", "fields[amount]", "fields[detail]")]
        self._bars = Progress(texts[0], BarColumn(), texts[1], TimeRemainingColumn(), texts[2])
        console = Console(stderr=True)
        self._live = Live(self._bars, console=console, transient=self._transient, refresh_per_second=4)
        self._live.start()
