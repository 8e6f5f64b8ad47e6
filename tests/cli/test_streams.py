"""Commands whose streams are closed, full, or know few characters, in processes of their own."""

import json
import os
import signal
import subprocess
import sys

import pytest

from bdcli.results.store import Store
from tests.cli.test_processes import start


def bdcli(command, **env):
    """`bdcli COMMAND` of a shell, with its redirections; exit code of bdcli itself, stdout, stderr."""
    line = command.replace("bdcli", f"{sys.executable} -m bdcli", 1)
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def kept():
    """The one run of the store and its text."""
    store = Store()
    (run,) = store.runs()
    return run, "".join(row.text for row in store.prompts(run.run_id))


def test_a_reader_that_leaves_ends_the_run_and_its_text_is_kept(prompt):
    code, out, err = bdcli(f"bdcli decode {prompt} --max-new-tokens 2000 | head -c 20")
    run, text = kept()
    assert (code, err) == (141, b"") and len(out) == 20
    assert run.status == "interrupted" and text.startswith(out.decode()) and run.new_tokens > 0


def test_a_full_disk_behind_stdout_is_one_line_and_the_text_is_kept(prompt):
    code, _, err = bdcli(f"bdcli decode {prompt} --max-new-tokens 40 > /dev/full")
    run, text = kept()
    assert code == 1 and err.count(b"\n") == 1 and b"No space left" in err and run.run_id.encode() in err
    assert run.status == "interrupted" and text


def test_closed_streams_take_nothing_from_a_run(prompt):
    words = f"bdcli decode {prompt} --max-new-tokens 8 --json"
    assert bdcli(f"{words} >&-") == (0, b"", b"")
    code, out, _ = bdcli(f"{words} --device quantum 2>&-")
    assert (code, out) == (2, b"")
    code, _, err = bdcli("bdcli decode - <&-")
    assert code == 2 and err.count(b"\n") == 1 and b"is empty" in err


def test_an_ascii_terminal_shows_text_figures_and_json(prompt):
    text = prompt.read_text("utf-8") + "# γ → é\n" * 20
    prompt.write_text(text, "utf-8")
    code, out, err = bdcli(f"bdcli decode {prompt} --max-new-tokens 16 --json", PYTHONIOENCODING="ascii")
    assert code == 0 and err == b"" and json.loads(out.decode("ascii"))["text"] == kept()[1]
    code, out, err = bdcli("bdcli report", PYTHONIOENCODING="ascii")
    assert code == 0 and err == b"" and b"speedup" in out


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
def test_a_closed_terminal_ends_a_run_and_its_text_is_kept(prompt):
    process = start("decode", prompt, "--max-new-tokens", 4000)
    process.stdout.read(20)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    run, text = kept()
    assert process.returncode == 130 and run.status == "interrupted" and text
