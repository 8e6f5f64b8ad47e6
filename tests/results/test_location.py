"""Which file or server a store is: every path is that very file, and bad places are one line."""

import os
import sqlite3
from pathlib import Path

import pytest

from bdcli.base.errors import BdcliError, UserError
from bdcli.results.store import Store
from tests.support.rows import add_run

NAMES = [
    "a?b.db",
    "x?mode=memory.db",
    "50%41.db",
    "#1.db",
    "a b&c;d.db",
    ":memory:",
    "file:x.db",
    "a:b@c.db",
    "ü.db",
    "p\udcff.db",
    "quote'\".db",
]


def names(folder):
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_that_very_file(name, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for place in (name, str(folder / name)):
        store = Store(place)
        add_run(store)
        store.close()
        assert names(folder) == [name] and (folder / name).read_bytes().startswith(b"SQLite format 3")
        assert len(Store(place, readonly=True).runs()) == len(Store(place, preview=True).runs()) == 1
        (folder / name).chmod(0o444)
        assert len(Store(place, readonly=True).runs()) == 1
        (folder / name).chmod(0o644)
        assert all(other.startswith(name) for other in names(folder)), "nothing but the file and its log"
        for other in folder.iterdir():
            other.unlink()


def test_urls_are_taken_as_they_are(tmp_path):
    add_run(Store(f"sqlite:///{tmp_path}/url.db"))
    add_run(Store("sqlite://"))
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".db"] == ["url.db"]


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("x" * 300 + ".db", "File name too long"),
        ("{tmp}/" + "y" * 300 + "/r.db", "File name too long"),
        ("{tmp}", "is a folder"),
        ("{tmp}/file/r.db", "store .*/file/r.db"),
        ("/proc/nowhere/r.db", "store /proc/nowhere/r.db"),
        ("~nobody-of-this-name/r.db", "no such home directory"),
    ],
)
@pytest.mark.parametrize("mode", [{}, {"readonly": True}, {"preview": True}], ids=["open", "readonly", "preview"])
def test_bad_places_are_one_line(place, problem, mode, tmp_path):
    (tmp_path / "file").write_text("x")
    place = place.replace("{tmp}", str(tmp_path))
    if mode == {"preview": True} and not place.startswith(("x", "~", f"{tmp_path}/y")):
        assert Store(place, preview=True).runs() == [], "a preview only reads what is there"
        return
    with pytest.raises(UserError, match=f"{problem}|there is no store") as refused:
        Store(place, **mode)
    assert "\n" not in str(refused.value)


def test_without_a_home_the_store_asks_for_a_place(monkeypatch, tmp_path):
    def no_home(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("BDCLI_DB")
    for name in ("HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    for mode in ({}, {"readonly": True}, {"preview": True}):
        with pytest.raises(UserError, match=r"no home directory .* Give --db"):
            Store(**mode)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_a_store_that_fails_later_is_one_line_with_its_path(tmp_path):
    """As on a full disk: exit code 1, for something was computed; 2 where nothing was."""
    place = tmp_path / "r.db"
    store = Store(str(place))
    run_id = store.begin("decode", {})
    with sqlite3.connect(place) as file:
        file.execute("CREATE TRIGGER full BEFORE UPDATE ON run BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
        file.execute("CREATE TRIGGER more BEFORE INSERT ON run BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
    with pytest.raises(BdcliError, match=f"{place} cannot be used .*disk is full") as late:
        store.finish(run_id, "done")
    with pytest.raises(UserError, match="disk is full"):
        store.begin("decode", {})
    assert late.value.exit_code == 1


def test_bytes_of_names_are_stored_escaped(tmp_path):
    store = Store(str(tmp_path / "r.db"))
    run_id = store.begin("decode", {"stop": ["\udcff"], "prompts": {"a\udcfe": 1}}, dataset="p\udcff")
    store.update(run_id, target="/m\udc80/t")
    store.finish(run_id, "failed", error="no p\udcff")
    (run,) = Store(str(tmp_path / "r.db")).runs()
    assert (run.dataset, run.target, run.error) == (r"p\xff", r"/m\x80/t", r"no p\xff")
    assert run.config == {"stop": [r"\xff"], "prompts": {r"a\xfe": 1}}
