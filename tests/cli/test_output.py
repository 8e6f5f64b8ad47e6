"""Progress as people see it: bars on a terminal, lines now and then elsewhere."""

import io
import sys
from types import SimpleNamespace

import pytest
import typer

from bdcli.base import console
from bdcli.cli.output import DecodeProgress, DistillProgress, PretrainProgress, SweepProgress
from bdcli.results.schema import Run


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stderr(monkeypatch):
    """A function that puts a terminal, or a file, in place of stderr."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")

    def put(stream):
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return put


def test_elsewhere_a_line_comes_with_every_tenth_and_after_a_long_silence(stderr, monkeypatch):
    shown, clock = stderr(io.StringIO()), iter([0, 1, 2, 3, 100])
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with PretrainProgress() as progress:
        for done in (0, 5, 10, 11, 12):
            progress.advance("pretrain", done, 100, f"loss {done}")
        progress.note("a note")
    assert shown.getvalue().splitlines() == [
        "bdcli: pretrain: 10 of 100 loss 10",
        "bdcli: pretrain: 12 of 100 loss 12",
        "bdcli: a note",
    ]


def test_a_terminal_shows_a_bar_for_every_phase(stderr):
    shown = stderr(Terminal())
    with DistillProgress() as progress:
        progress.advance("windows", 3, 4, "1 dropped")
        progress.advance("distil", 2, 8, "loss 1.0")
        progress.measured([SimpleNamespace(score=0.5, acceptance_rate=0.5, budget=256)], step=2)
    text = shown.getvalue()
    assert "windows" in text and "3 of 4" in text and "loss 1.0" in text
    assert "step 2: mean acceptance over budgets 50.0%" in text


def test_the_text_follows_the_bars_of_the_prompt(stderr, capsys):
    shown = stderr(Terminal())
    with DecodeProgress() as progress:
        progress.advance("reading the prompt: target", 1, 2)
        progress.text("hello")
        before = len(shown.getvalue())
        progress.advance("reading the prompt: target", 2, 2)
        assert len(shown.getvalue()) == before, "nothing is drawn into the text"
    assert capsys.readouterr().out == "hello" and "reading the prompt: target" in shown.getvalue()


def test_decoding_is_silent_elsewhere(stderr):
    shown = stderr(io.StringIO())
    with DecodeProgress(show_text=False) as progress:
        progress.advance("reading the prompt: target", 2, 2)
        progress.text("hello")
    assert shown.getvalue() == ""


def test_held_out_losses_and_grids_are_lines(stderr):
    shown = stderr(io.StringIO())
    loss = SimpleNamespace(nll=1.5, tail_nll=1.25, tail_nll_short=1.5, context=256)
    PretrainProgress().measured([loss], step=1, tokens=4096)
    DistillProgress(quiet=True).measured([], step=1)
    assert shown.getvalue() == ("bdcli: 4096 tokens: held-out loss 1.500 at 256, long context is worth +0.250 nat\n")


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_sweep_shows_its_share_and_its_cells(stderr, stream):
    shown = stderr(stream())
    run = Run(run_id="a", command="bench", status="running", arm="bd-256", context=4096, valid=True, speedup=1.5)
    with SweepProgress() as progress:
        progress.advance("bench", 100.0, 400.0, "pg19 4096, prompt 1 of 2: bd-256")
        progress.advance("bench", 200.0, 400.0, "pg19")
        progress.measured([run])
    text = shown.getvalue()
    assert "50%" in text and "pg19" in text and "bd-256" in text
    if not shown.isatty():
        assert text == "bdcli: 50% done, pg19: 1 cells, best bd-256 1.50× at 4096\n"


def test_ctrl_c_in_training_says_how_to_resume(stderr, monkeypatch):
    shown = stderr(io.StringIO())
    monkeypatch.setattr(sys, "argv", ["bdcli", "distill", "my recipe.yaml"])
    with pytest.raises(typer.Exit) as stop, DistillProgress():
        raise KeyboardInterrupt
    assert stop.value.exit_code == 130 and "bdcli distill 'my recipe.yaml'" in shown.getvalue()
    with pytest.raises(KeyboardInterrupt), DecodeProgress():
        raise KeyboardInterrupt
