"""Commands in processes of their own: Ctrl-C, SIGTERM, kill, and two at once."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bdcli.results.store import Store

RECIPES = Path(__file__).parents[2] / "recipes"


def start(*args, **settings):
    """Unbuffered pipes: what one read leaves is there for the next. It heeds SIGINT, also where the tests ignore it."""
    words = [sys.executable, "-m", "bdcli", *map(str, args)]
    pipe, env = subprocess.PIPE, os.environ | {"OMP_NUM_THREADS": "1"}
    settings = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)} | settings
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, env=env, bufsize=0, **settings)


def test_ctrl_c_keeps_what_was_written_and_kill_leaves_a_row(prompt):
    polite = start("decode", prompt, "--max-new-tokens", 4000)
    shown = polite.stdout.read(20)  # it is writing text now
    polite.send_signal(signal.SIGINT)
    rest, err = polite.communicate(timeout=60)
    killed = start("decode", prompt, "--max-new-tokens", 4000)
    killed.stdout.read(20)
    killed.kill()
    killed.communicate()
    out = (shown + rest).decode()
    assert polite.returncode == 130 and b"Traceback" not in err and b"is kept as run" in err and "speedup" in out
    runs = Store().runs()
    assert len(runs) == 2 and {r.status for r in runs} == {"interrupted"}
    finished = next(r for r in runs if r.prompts)
    kept = Store().prompts(finished.run_id)[0]
    assert kept.text and out.startswith(kept.text) and len(kept.tokens) == finished.new_tokens > 0


def test_sigterm_ends_a_background_run_as_ctrl_c_does(prompt):
    """Shells start background jobs with SIGINT ignored; SIGTERM has to work all the same."""
    ignoring = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    process = start("decode", prompt, "--max-new-tokens", 4000, preexec_fn=ignoring)
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)  # stays ignored
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"is kept as run" in err
    assert Store().runs()[0].status == "interrupted" and Store().runs()[0].new_tokens > 0


@pytest.mark.parametrize(
    ("words", "sign"),
    [
        (("prepare", RECIPES / "llama_4k.yaml", "--set", "seed=3", "--out", "here"), b"passages: 1"),
        (("bench", RECIPES / "bench_pocket.yaml", "--quick", "--arms", "bd-256"), b"% done"),
    ],
    ids=["prepare", "bench"],
)
def test_an_interrupted_command_says_how_to_continue(words, sign, tmp_path):
    """With all of its options, not with the recipe alone."""
    process = start(*words, cwd=tmp_path)
    assert any(sign in line for line in process.stderr)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"invalid" not in err and b"Traceback" not in err
    assert f"continue with: bdcli {shlex.join(map(str, words))}\n".encode() in err
    assert all("×" in row for row in out.decode().splitlines()[1:]), "no row of a cell that was not reached"


def test_two_processes_decode_at_once(prompt):
    both = [start("decode", prompt, "--max-new-tokens", 12, "--json") for _ in range(2)]
    ids = {json.loads(p.communicate(timeout=120)[0])["run_id"] for p in both}
    assert ids == {r.run_id for r in Store().runs()} and len(ids) == 2
