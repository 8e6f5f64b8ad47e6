"""Folders of a user with and without a home directory, and files that cannot be written."""

import errno
import os
from pathlib import Path

import pytest

from bdcli.base import places
from bdcli.base.errors import BdcliError, UserError
from bdcli.base.files import check_disk_space, explain, make_folder, new_folder, user_path, write_file


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """A user of no name, and temporary files in `tmp_path`."""
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", *places.LIBRARY_CACHES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_caches_are_temporary_files(tmp_path):
    places.prepare_caches()
    (own,) = places.cache_folders()
    assert own.parent == tmp_path and [path.name for path in tmp_path.iterdir()] == [own.name]
    for name in places.LIBRARY_CACHES:
        assert Path(os.environ.pop(name)).parent == own


@pytest.mark.usefixtures("homeless")
def test_without_any_place_there_is_no_cache_and_torch_decodes(monkeypatch):
    def nowhere():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(places.tempfile, "gettempdir", nowhere)
    places.prepare_caches()
    assert not list(places.cache_folders())
    code_cache = pytest.importorskip("bdcli.backends.cpu.machine.code_cache")
    with pytest.raises(BdcliError, match="no folder for compiled code"):
        code_cache.code_folder.__wrapped__()


def test_a_home_that_cannot_be_written_is_passed_over(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: str(tmp_path))
    assert [path.parent for path in places.cache_folders()] == [tmp_path]


def test_a_folder_of_bytes_is_read_through_a_link(tmp_path):
    folder = tmp_path / "m\udcff"
    folder.mkdir()
    link = places.readable_folder(folder)
    assert str(link).isascii() and link.resolve() == folder.resolve()
    assert places.readable_folder(tmp_path) == tmp_path


def test_a_full_disk_is_named_with_the_file_and_nothing_half_is_left(tmp_path):
    def full(_file):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "state.pt"
    write_file(path, "old")
    with pytest.raises(BdcliError, match=f"{path}: No space left") as failure:
        write_file(path, full)
    assert failure.value.exit_code == 1 and path.read_text() == "old"
    with pytest.raises(BdcliError, match="No space left"), new_folder(tmp_path / "model") as fresh:
        (fresh / "a").write_text("x")
        full(None)
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]
    rust = RuntimeError("I/O error: No space left on device (os error 28)")
    assert "No space left" in str(explain(rust, path)) and explain(RuntimeError("other")) is None


def test_places_that_cannot_be_used_are_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / ("x" * 300), tmp_path / "file" / "below"):
        for use in (make_folder, lambda p: write_file(p, "x")):
            with pytest.raises(UserError, match=str(path)):
                use(path)
    with pytest.raises(UserError, match="no such home"):
        user_path("~nobody-of-this-name/x")


def test_small_disks_are_said_in_megabytes(tmp_path, monkeypatch):
    class Disk:
        f_bavail, f_frsize = 30, 2**20

    monkeypatch.setattr(os, "statvfs", lambda _: Disk)
    with pytest.raises(BdcliError, match="has 32 MB free, 41 MB are needed"):
        check_disk_space(tmp_path / "not" / "yet", 41_000_000)
    with pytest.raises(BdcliError, match=r"has 32 MB free, 2\.0 GB are needed"):
        check_disk_space(tmp_path, 2_000_000_000)
