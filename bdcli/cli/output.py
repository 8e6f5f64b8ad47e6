"""What a command shows: its progress on stderr, its result on stdout. Rich and the store's tables are imported late."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from bdcli.base.console import ConsoleProgress, note
from bdcli.base.errors import NotStoredError
from bdcli.base.streams import write


@contextmanager
def shown_first(show: Callable[[dict], None]) -> Iterator[None]:
    """Inside, a run whose row cannot be written has its result shown before the error ends the command."""
    try:
        yield
    except NotStoredError as error:
        show(error.result)
        raise


class DecodeProgress(ConsoleProgress):
    """Bars while the prompt is read, then the text on stdout as it is generated."""

    def __init__(self, show_text: bool = True):
        super().__init__(lines=False, transient=True)
        self._show_text = show_text

    def advance(self, phase: str, done: float, total: float, detail: str = "") -> None:
        super().advance(phase, done, total, detail)
        if done == total and phase.endswith("drafter"):  # the last to read; then rounds are timed
            self.close()

    def text(self, piece: str) -> None:
        self.close()
        if self._show_text:
            write(piece)


class PretrainProgress(ConsoleProgress):
    """Bars or lines of a training run, and its held-out losses."""

    def __init__(self):
        super().__init__(resumable=True)

    def measured(self, rows: Sequence, **at: int) -> None:
        for loss in rows:
            gain = loss.tail_nll_short - loss.tail_nll
            worth = f"long context is worth {gain:+.3f} nat"
            note(f"{at['tokens']} tokens: held-out loss {loss.nll:.3f} at {loss.context}, {worth}")


class DistillProgress(ConsoleProgress):
    """Bars or lines of a training run, and unless `quiet` the mean of every acceptance grid."""

    def __init__(self, quiet: bool = False):
        super().__init__(resumable=True)
        self._quiet = quiet

    def measured(self, rows: Sequence, **at: int) -> None:
        rates = [cell.score for cell in rows if cell.acceptance_rate is not None and cell.budget != "full"]
        mean = sum(rates) / len(rates) if rates else float("nan")
        if not self._quiet:
            note(f"step {at['step']}: mean acceptance over budgets {mean:.1%}, outside loops")


class SweepProgress(ConsoleProgress):
    """A live table of the cells with one bar; elsewhere a line after every prompt."""

    def __init__(self):
        super().__init__(lines=False, transient=True)
        self._share, self._detail = 0.0, ""

    def advance(self, phase: str, done: float, total: float, detail: str = "") -> None:
        self._share, self._detail = done / total, detail
        super().advance(phase, self._share, 1, detail)

    def measured(self, rows: Sequence, **_at: int) -> None:
        from bdcli.results.tables import as_table, sweep_line

        if not self.interactive:
            note(f"{self._share:.0%} done, {self._detail}: {sweep_line(rows)}")
        elif self._live is not None:
            self.show_above(as_table(rows, self.width))


# The summary of a decode run: labels, and sentences around its figures.
SUMMARY = {
    "run": "{run_id}",
    "context": "{context} tokens, {new_tokens} new",
    "budget": "{budget} ({select}, {positions}), at most {max_drafter_entries} entries held",
    "gamma": "{gamma}",
    "attention": "{attention} ({attention_detail})",
    "acceptance": "{acceptance_rate} of {drafted} drafted",
    "outside loops": "{acceptance_rate_no_loops}, loop rate {loop_rate}",
    "mean length": "{mean_accepted_length} tokens per target forward",
    "first token": "{ttft_s}",
    "AR": "{ar_tokens_per_second}",
    "speculative": "{tokens_per_second}",
    "speedup": "{speedup}",
    "equal to AR": "{output_equal}",
}


def show_summary(result: dict) -> None:
    """Figures of a decode run on stdout."""
    from rich.console import Console
    from rich.table import Table

    from bdcli.results.figures import Figure, figures_of
    from bdcli.results.schema import Run

    figures = figures_of(Run)
    sentences = {name: figures.get(name, Figure()).sentence(value) for name, value in result.items()}
    if result["ties"]:
        sentences["output_equal"] += f", {result['ties']} ties"
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    for label, pattern in SUMMARY.items():
        table.add_row(label, pattern.format_map(sentences))
    print()
    Console().print(table)


def show_table(runs: list) -> None:
    """The report's table of stored runs on stdout."""
    from rich.console import Console

    from bdcli.results.tables import as_table

    console = Console()
    if not console.is_terminal:
        console.width = 240  # a pipe has no width; do not cut columns
    console.print(as_table(runs, console.width))


def show_grids(result: dict) -> None:
    """Acceptance before and after, per data set, context and budget, in all and outside loops, on stdout."""
    from rich.console import Console
    from rich.table import Table

    from bdcli.results.figures import PERCENT, Figure

    table = Table(box=None, pad_edge=False, header_style="bold")
    names = "dataset", "context", "budget", "before", "after", "95 % interval", "outside loops before", "after"
    for name in (*names, "mean length"):
        table.add_column(name, justify="left" if name == "dataset" else "right")

    percent = Figure(PERCENT, missing="").sentence
    for before, after in zip(result["before"], result["after"], strict=True):
        span = f"{percent(after['low'])} .. {percent(after['high'])}" if after["low"] is not None else ""
        table.add_row(
            after["dataset"],
            str(after["context"]),
            str(after["budget"]),
            percent(before["acceptance_rate"]),
            percent(after["acceptance_rate"]),
            span,
            percent(before["acceptance_rate_no_loops"]),
            percent(after["acceptance_rate_no_loops"]),
            f"{after['mean_accepted_length']:.2f}",
        )
    Console().print(table)
    print(
        f"run {result['run_id']}: {result['steps']} steps, best at {result['best_step']}, {result['skipped']} skipped"
        + (f", stopped: {result['stopped']}" if result["stopped"] else "")
    )
    print(
        f"{result['tokens_per_second']:.0f} target tokens/s, {result['positions_per_target_token']:.2f} supervised "
        f"positions each, peak memory {result['peak_memory_bytes'] / 1e9:.1f} GB"
    )
    print(f"decode with it: bdcli decode --drafter {result['checkpoint']} PROMPT_FILE")


def show_accounts(result: dict) -> None:
    """What a prepare run read and what became of it, on stdout."""
    for what in ("documents", "windows"):
        a = result[what]
        dropped = ", ".join(f"{count} {why}" for why, count in a["dropped"].items() if count) or "none"
        print(f"{what}: {a['read']} read, {a['kept']} kept, dropped: {dropped}, {a['failed']} failed")
    if result["written"]:
        print(f"{result['written']} ends written by the target, mean loop rate {result['loop_rate']:.0%}")
    print(f"{result['shards']} shards, {result['bytes'] / 1e6:.1f} MB, {result['passages']} held-out passages")
    print(f"run {result['run_id']}: {result['folder']}")


def show_losses(result: dict) -> None:
    """Held-out loss before and after a pretrain run, on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("context", "loss before", "after", "long context is worth", "windows"):
        table.add_column(name, justify="right")
    before = {m["context"]: m for m in result["before"]}
    for m in result["after"]:
        first = before.get(m["context"])
        gain = f"{m['tail_nll_short'] - m['tail_nll']:+.3f} nat"
        table.add_row(
            str(m["context"]), f"{first['nll']:.3f}" if first else "", f"{m['nll']:.3f}", gain, str(m["windows"])
        )
    Console().print(table)
    print(f"run {result['run_id']}: {result['tokens']} tokens in {result['steps']} steps, {result['skipped']} skipped")
    print(f"model: {result['checkpoint']}")
