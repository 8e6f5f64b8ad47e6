"""The store: every run leaves a row whatever happens, processes share it, and bad stores are refused in one line."""

import sqlite3
import subprocess
import sys

import pytest

from bdcli.base.errors import UserError
from bdcli.results.schema import Prompt
from bdcli.results.store import Store
from tests.support.rows import add_run


def test_a_run_and_its_prompt_come_back(tmp_path):
    store = Store(str(tmp_path / "new" / "r.db"))
    run_id = store.begin("decode", {"a": [1]}, budget="full", gamma=None)
    assert store.runs()[0].status == "running"
    prompt = Prompt(run_id=run_id, source="p.txt", sha256="ab", text="héllo", tokens=[3, 4], rounds=[[2, 2, 1, 900, 0]])
    store.finish(run_id, "done", [prompt], budget=512, gamma="auto", speedup=1.5, output_equal=True)
    run = Store(str(tmp_path / "new" / "r.db")).runs()[0]
    assert (run.run_id, run.status, run.budget, run.gamma, run.speedup) == (run_id, "done", 512, "auto", 1.5)
    assert run.config == {"a": [1]} and run.prompts == 1 and run.versions["python"] and run.machine and run.finished_at
    kept = store.prompts(run_id)[0]
    assert (kept.text, kept.tokens, kept.rounds) == ("héllo", [3, 4], [[2, 2, 1, 900, 0]])
    with pytest.raises(AttributeError, match="no column spedup"):
        store.finish(run_id, "done", spedup=2.0)


def test_the_place_comes_from_flag_then_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("BDCLI_DB", str(tmp_path / "env.db"))
    assert Store().name == str(tmp_path / "env.db")
    assert Store(str(tmp_path / "flag.db")).name == str(tmp_path / "flag.db")
    assert Store(f"sqlite:///{tmp_path}/url.db").runs() == []


def test_two_processes_write_at_once(tmp_path):
    """Both open ten new stores, each in the same moment, and fill them."""
    work = (
        "import sys\nfrom bdcli.results.store import Store\n"
        "for n in range(10):\n    print('ready', flush=True)\n    sys.stdin.readline()\n"
        "    s = Store(f'{sys.argv[1]}/{n}.db')\n"
        "    for i in range(5):\n        s.finish(s.begin('decode', {}, seed=i), 'done', context=i)\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", work, str(tmp_path)], **pipes) for _ in range(2)]
    for _ in range(10):
        assert [p.stdout.readline() for p in both] == ["ready\n"] * 2
        for process in both:
            process.stdin.write("\n")
            process.stdin.flush()
    assert [p.wait() for p in both] == [0, 0]
    for n in range(10):
        place = str(tmp_path / f"{n}.db")
        runs = Store(place).runs()
        assert len(runs) == 10 == len({r.run_id for r in runs})
        assert sqlite3.connect(place).execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_killed_process_leaves_an_interrupted_run(tmp_path):
    work = (
        "import os, sys\nfrom bdcli.results.store import Store\n"
        "Store(sys.argv[1]).begin('decode', {})\nos.kill(os.getpid(), 9)"
    )
    place = str(tmp_path / "r.db")
    assert subprocess.run([sys.executable, "-c", work, place], check=False).returncode == -9
    mine = Store(place).begin("decode", {})
    assert {r.run_id == mine: r.status for r in Store(place).runs()} == {False: "interrupted", True: "running"}


def test_a_store_of_an_older_version_gains_the_new_columns(tmp_path):
    place = tmp_path / "old.db"
    old = sqlite3.connect(place)
    old.execute("CREATE TABLE run (run_id VARCHAR PRIMARY KEY, started_at DATETIME, command VARCHAR, status VARCHAR)")
    old.execute("INSERT INTO run VALUES ('a', '2025-01-01 00:00:00', 'decode', 'done')")
    old.commit()
    runs = Store(str(place)).runs()
    assert runs[0].run_id == "a" and runs[0].speedup is None


def test_bad_stores_are_refused(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("this is not a database, " * 100)
    with pytest.raises(UserError, match="is not a SQLite file"):
        Store(str(text))
    assert text.read_text().startswith("this is not a database")
    with pytest.raises(UserError, match="is a folder"):
        Store(str(tmp_path))
    with pytest.raises(UserError, match="nosuchdb"):
        Store("nosuchdb://x/y")
    place = tmp_path / "ro.db"
    store = Store(str(place))
    run_id = add_run(store)
    store.close()
    place.chmod(0o444)
    with pytest.raises(UserError, match="is read-only"):
        Store(str(place))
    assert [r.run_id for r in Store(str(place), readonly=True).runs()] == [run_id]
