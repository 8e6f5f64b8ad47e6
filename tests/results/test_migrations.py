"""Stores of every earlier version open, keep what they hold and gain what is new; a newer store is refused."""

import gzip
import sqlite3
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import String

from bdcli.base.errors import UserError
from bdcli.results import migrations
from bdcli.results.store import Store

STORED = Path(__file__).with_name("store_7740430.db.gz")  # a decode run and a bench sweep of two cells

NAMES = [name for name, _ in migrations.MIGRATIONS]


@pytest.fixture
def old(tmp_path):
    """A store as commit 7740430 wrote it, before there were migrations."""
    path = tmp_path / "old.db"
    path.write_bytes(gzip.decompress(STORED.read_bytes()))
    return path


def columns(path):
    """{table: {column: (type, primary key)}}; whether null is allowed cannot be changed afterwards in SQLite."""
    with sqlite3.connect(path) as file:
        tables = [name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {t: {c[1]: (c[2], c[5]) for c in file.execute(f"PRAGMA table_info({t})")} for t in tables}


def indexes(path):
    with sqlite3.connect(path) as file:
        return {name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}


def applied(path):
    with sqlite3.connect(path) as file:
        return [name for (name,) in file.execute("SELECT name FROM migration ORDER BY rowid")]


def test_a_store_before_migrations_is_reported_and_takes_new_runs(old, cli, tmp_path):
    before = old.read_bytes()
    runs = cli("report", "--format", "json", "--db", old).json["runs"]
    assert [(r["command"], r["status"], r["valid"]) for r in runs] == [
        ("bench", "done", True),
        ("bench", "done", True),
        ("decode", "done", None),
    ]
    assert all(r["speedup"] > 0 and r["invalid_reason"] is None for r in runs), "an unbroken seal keeps its speedup"
    assert old.read_bytes() == before, "a report changes nothing"
    prompt = tmp_path / "prompt.txt"
    cli("prompt", "--ctx", 300, "--out", prompt)
    new = cli("decode", prompt, "--max-new-tokens", 8, "--budget", 128, "--json", "--db", old)
    assert new.code == 0
    later = cli("report", "--format", "json", "--db", old).json["runs"]
    assert later[0]["run_id"] == new.json["run_id"] and later[1:] == runs
    assert applied(old) == NAMES


def test_a_changed_cell_of_an_old_store_is_still_refused(old, cli):
    with sqlite3.connect(old) as file:
        file.execute("UPDATE run SET tokens_per_second = 900 WHERE method = 'bd' AND command = 'bench'")
    done = cli("report", "--format", "json", "--command", "bench", "--db", old)
    assert [r["valid"] for r in done.json["runs"]] == [False, True]
    assert "was changed after it was measured" in done.err


def test_an_old_store_that_cannot_be_written_is_reported(old, cli):
    old.chmod(0o444)
    assert len(cli("report", "--format", "json", "--db", old).json["runs"]) == 3


@pytest.mark.parametrize("lost", ["none", "columns", "tables"])
def test_a_migrated_store_has_the_columns_of_a_new_one(old, tmp_path, lost):
    """So nobody adds a column to the schema without a migration."""
    with sqlite3.connect(old) as file:
        if lost == "columns":
            for table, name in (("run", "seal"), ("run", "ties"), ("prompt", "error"), ("prompt", "finish_reason")):
                file.execute(f"ALTER TABLE {table} DROP COLUMN {name}")
        if lost == "tables":
            file.execute("DROP TABLE evaluation")
            file.execute("DROP TABLE loss")
    Store(str(old)).close()
    new = tmp_path / "new.db"
    Store(str(new)).close()
    assert columns(old) == columns(new) and indexes(old) == indexes(new)
    assert applied(old) == applied(new)


def test_a_later_migration_is_applied_once_to_stores_old_and_new(old, tmp_path, monkeypatch):
    change = ("more words", partial(migrations.add_columns, table="run", columns={String: "colour"}))
    Store(str(old)).close()
    monkeypatch.setattr(migrations, "MIGRATIONS", [*migrations.MIGRATIONS, change])
    for path in (old, tmp_path / "new.db"):
        for _ in range(2):
            Store(str(path)).close()
        assert "colour" in columns(path)["run"] and set(applied(path)) == {*NAMES, "more words"}


def test_a_failed_migration_leaves_nothing_behind(old, monkeypatch):
    def broken(connection):
        migrations.add_columns(connection, "run", {String: "colour"})
        raise RuntimeError("half way")

    monkeypatch.setattr(migrations, "MIGRATIONS", [*migrations.MIGRATIONS, ("broken", broken)])
    with pytest.raises(RuntimeError, match="half way"):
        Store(str(old))
    assert "colour" not in columns(old)["run"] and applied(old) == NAMES


def test_a_store_of_a_newer_version_is_refused_in_one_line(tmp_path, cli):
    path = tmp_path / "new.db"
    Store(str(path)).close()
    with sqlite3.connect(path) as file:
        file.execute("INSERT INTO migration VALUES ('from the future', '2030-01-01 00:00:00')")
    with pytest.raises(UserError, match="written by a newer bdcli"):
        Store(str(path))
    done = cli("report", "--db", path)
    assert done.code == 2 and done.err.count("\n") == 1 and "Update bdcli" in done.err


def test_two_processes_migrate_an_old_store_at_once(old, tmp_path):
    work = (
        "import sys\nfrom bdcli.results.store import Store\n"
        "for n in range(8):\n    print('ready', flush=True)\n    sys.stdin.readline()\n"
        "    s = Store(f'{sys.argv[1]}/{n}.db')\n    s.finish(s.begin('decode', {}), 'done')\n"
    )
    for n in range(8):
        (tmp_path / f"{n}.db").write_bytes(old.read_bytes())
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", work, str(tmp_path)], **pipes) for _ in range(2)]
    for _ in range(8):
        assert [p.stdout.readline() for p in both] == ["ready\n"] * 2
        for process in both:
            process.stdin.write("\n")
            process.stdin.flush()
    assert [p.wait() for p in both] == [0, 0]
    for n in range(8):
        assert len(Store(str(tmp_path / f"{n}.db")).runs()) == 5
        assert applied(tmp_path / f"{n}.db") == NAMES
