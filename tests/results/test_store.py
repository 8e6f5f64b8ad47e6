"""The store: every run leaves a row whatever happens, processes share it, and bad stores are refused in one line."""

import csv
import io
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from bdcli.base.errors import UserError
from bdcli.results import plots
from bdcli.results.query import Filter
from bdcli.results.schema import Prompt, Run
from bdcli.results.store import Store


def add(store, **fields):
    run_id = store.begin("decode", {"budget": 512}, **{"context": 4096, "dataset": "book", **fields})
    store.finish(run_id, "done", [Prompt(run_id=run_id, source="x", sha256="0", text="t", tokens=[1, 2])])
    return run_id


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
    run_id = add(store)
    store.close()
    place.chmod(0o444)
    with pytest.raises(UserError, match="is read-only"):
        Store(str(place))
    assert [r.run_id for r in Store(str(place), readonly=True).runs()] == [run_id]


def test_filters(tmp_path):
    store = Store(str(tmp_path / "r.db"))
    for context, budget in ((4096, 512), (4100, "full"), (3500, 256), (8192, 512), (7000, 512)):
        add(store, context=context, budget=budget)

    def contexts(**wanted):
        return sorted(r.context for r in store.runs() if Filter(**wanted)(r))

    assert contexts(ctx="4k") == [4096, 4100]
    assert contexts(ctx="4096") == [4096]
    assert contexts(ctx="8k") == [8192]  # 7000 is 14.6 % off
    assert contexts(budget="full") == [4100]
    assert contexts(budget="512", ctx="8k") == [8192]
    assert contexts(dataset="other") == [] and len(contexts(command="decode", status="done")) == 5
    with pytest.raises(UserError, match="--ctx banana"):
        contexts(ctx="banana")


def test_formats_agree(tmp_path, cli):
    store = Store(str(tmp_path / "runs.db"))
    for speedup in (1.25, 2.0):
        run_id = store.begin("decode", {}, context=4096)
        store.finish(run_id, "done", speedup=speedup, acceptance_rate=0.5, budget=512)
    as_json = cli("report", "--format", "json").json["runs"]
    rows = list(csv.DictReader(io.StringIO(cli("report", "--format", "csv").out)))
    assert [r["speedup"] for r in as_json] == [2.0, 1.25] == [float(r["speedup"]) for r in rows]
    assert set(as_json[0]) == set(Run.model_fields) == set(rows[0])
    for form in ("markdown", "table"):
        shown = cli("report", "--format", form).out
        assert shown.index("2.00×") < shown.index("1.25×") and "50.0 %" in shown
    assert len(cli("report", "--format", "json", "--limit", 1).json["runs"]) == 1


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(tmp_path, suffix):
    store = Store(str(tmp_path / "r.db"))
    for context in (4096, 16384):
        for budget in (256, "full"):
            run_id = add(store, context=context, budget=budget)
            store.finish(run_id, "done", acceptance_rate=0.4, speedup=1.5)
    path = tmp_path / f"plot.{suffix}"
    plots.plot(store.runs(), path)
    assert path.stat().st_size > 5000
    with pytest.raises(UserError, match="picture format"):
        plots.plot(store.runs(), tmp_path / "plot.gif")


def test_report_on_nothing(cli):
    done = cli("report")
    assert done.code == 0 and "bdcli decode PROMPT_FILE" in done.err
    assert json.loads(cli("report", "--format", "json").out) == {"runs": []}
    gone = cli("report", "--db", "nowhere.db")
    assert gone.code == 2 and "there is no store at nowhere.db" in gone.err
    assert not Path("nowhere.db").exists() and not Path(os.environ["BDCLI_DB"]).exists()
