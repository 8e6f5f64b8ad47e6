"""Files of a source: which ones of a folder are read, which are passed over by name, and that none ends a run."""

import gzip
import io
import os
import socket
import tarfile
from pathlib import Path

import pytest

from bdcli.base.errors import UserError
from bdcli.data.document import Unread
from bdcli.data.files import file_kind, folder_files
from bdcli.data.sources import documents, missing_sources, split_source
from bdcli.data.split import TrainingDocuments


def read(path):
    unread = Unread()
    return {d.name: d.text for d in documents(str(path), unread)}, unread


@pytest.fixture
def books(tmp_path):
    """A folder with one text."""
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("a")
    return tmp_path / "books"


def test_suffixes_of_any_case_and_compressed_files_are_read(books):
    for name in ("B.TXT", "c.Txt", "e.f.txt"):
        (books / name).write_text(name)
    (books / "D.JSONL").write_text('{"text": "row"}')
    for name in ("g.txt.gz", "H.TXT.GZ", "i.jsonl.gz"):
        (books / name).write_bytes(gzip.compress(b'{"text": "packed"}'))
    found, unread = read(books)
    assert {*found} == {"a", "B", "c", "e.f", "D:1", "g", "H", "i:1"} and found["i:1"] == "packed"
    assert not unread.failed and not unread.passed_over
    assert [file_kind(name) for name in ("a.TAR.GZ", "b.tgz", "c.parquet")] == [".tar", ".tar", ".parquet"]
    assert {file_kind(name) for name in ("d.parquet.gz", "e.gz", "f", "g.txt.zst", "txt", ".txt", "")} == {None}


def test_files_of_other_kinds_are_passed_over_by_suffix_and_count(books):
    for name in ("b.md", "c.MD", "d.jsonl.zst", "e.html", "no suffix", "f.parquet.gz", "Mr. Smith", "g.txt~"):
        (books / name).write_text("x")
    for name in ("._a.txt", ".hidden.jsonl", ".DS_Store"):
        (books / name).write_bytes(b"\0\5\26\7")
    (books / ".git").mkdir()
    (books / ".git" / "b.txt").write_text("x")
    found, unread = read(books)
    assert found == {"a": "a"} and not unread.failed
    assert list(unread.lines()) == [
        "12 files passed over: 1 .html (e.html), 1 .jsonl.zst (d.jsonl.zst), 2 .md (b.md, c.MD), "
        "1 .parquet.gz (f.parquet.gz), 1 .txt~ (g.txt~), 4 hidden (.DS_Store, ._a.txt, .git, ...), "
        "2 without a suffix (Mr. Smith, no suffix)"
    ]


def test_links_are_followed_once_and_never_round_in_circles(books, tmp_path):
    (tmp_path / "more" / "deep").mkdir(parents=True)
    (tmp_path / "more" / "deep" / "b.txt").write_text("b")
    (tmp_path / "c.txt").write_text("c")
    (books / "inner").mkdir()
    (books / "inner" / "d.txt").write_text("d")
    (books / "aaa").symlink_to(tmp_path / "more")
    (books / "aab").symlink_to("aaa/deep")  # read below aaa already
    (books / "loop").symlink_to(books)
    (books / "inner" / "up").symlink_to("..")
    (tmp_path / "more" / "deep" / "back").symlink_to(books / "inner")
    (books / "0.txt").symlink_to("inner/d.txt")
    (books / "e.txt").symlink_to(tmp_path / "c.txt")
    (books / "f.txt").symlink_to(tmp_path / "c.txt")
    (books / "self.txt").symlink_to("self.txt")
    (books / "gone.txt").symlink_to("nowhere")
    found, unread = read(books)
    assert sorted(found.values()) == ["a", "b", "c", "d"] and {"d", "e"} <= {*found} and not unread.failed
    assert {kind: len(names) for kind, names in unread.passed_over.items()} == {
        "link to what is read already": 6,
        "dangling link": 2,
    }


def test_a_linked_folder_alone_is_a_source(books, tmp_path):
    (tmp_path / "link").symlink_to(books)
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "in").symlink_to(tmp_path / "link")
    assert read(tmp_path / "link")[0] == read(tmp_path / "outer")[0] == {"a": "a"}


def test_pipes_sockets_devices_and_folders_named_like_texts_never_stop_a_run(books):
    os.mkfifo(books / "p.txt")
    (books / "d.txt").mkdir()
    (books / "d.txt" / "inner.txt").write_text("inner")
    (books / "null.txt").symlink_to("/dev/null")
    place = Path.cwd()
    os.chdir(books)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("s.jsonl")
    finally:
        os.chdir(place)
    found, unread = read(books)
    assert found == {"a": "a", "inner": "inner"} and not unread.failed
    assert unread.passed_over == {"pipe": ["p.txt"], "device": ["null.txt"], "socket": ["s.jsonl"]}
    with pytest.raises(UserError, match=r"p\.txt is no file"):
        read(books / "p.txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_files_and_folders_without_permission_are_named(books):
    for name in ("b.txt", "c.jsonl", "d.parquet", "e.tar"):
        (books / name).write_text("x")
        (books / name).chmod(0)
    (books / "shut").mkdir(0)
    found, unread = read(books)
    assert found == {"a": "a"} and unread.failed == 5
    assert all("Permission denied" in line or "cannot be listed" in line for line in unread.failures)


def test_a_file_that_cannot_be_opened_is_named(books, monkeypatch):
    for name in ("b.txt", "c.jsonl", "d.parquet", "e.tar", "f.txt.gz"):
        (books / name).write_text("x")
    files = folder_files(books, Unread())
    for path in files[1:]:
        path.unlink()  # as if removed between listing and reading
    monkeypatch.setattr("bdcli.data.sources.folder_files", lambda *_: files)
    found, unread = read(books)
    assert found == {"a": "a"} and unread.failed == 5
    assert [line.split()[0] for line in unread.failures] == [str(path) for path in files[1:]]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"\xff\xfe\x00", "is UTF-16"),
        ("ab".encode("utf-16-le"), "is UTF-16"),
        ("ab".encode("utf-16-be"), "is UTF-16"),
        ("é".encode("latin-1"), r"is not UTF-8 \(byte 0\)"),
    ],
)
def test_texts_in_other_encodings_are_counted_and_named(body, why, books):
    (books / "b.txt").write_bytes(body)
    (books / "c.txt").write_bytes(b"\xef\xbb\xbfmarked")
    found, unread = read(books)
    assert found == {"a": "a", "c": "marked"} and unread.failed == 1
    accounts = TrainingDocuments([str(books)]).accounts
    assert accounts[0] == 3 and accounts[3] == 1
    with pytest.raises(UserError, match=rf"b\.txt {why}"):
        read(books / "b.txt")


def test_members_of_a_tar_are_read_and_odd_ones_named(books):
    members = {"x/b.txt": b"b", "x/._b.txt": b"\0", "c.txt": b"\xff", "README": b"e"}
    members["d.jsonl"] = b'{"text": "row"}\n[1]\n'
    with tarfile.open(books / "t.tgz", "w:gz") as archive:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    found, unread = read(books)
    assert found == {"a": "a", "b": "b", "d:1": "row", "README": "e"}
    assert unread.passed_over == {"hidden": ["._b.txt"]}
    assert [line.split(" is ")[0] for line in unread.failures] == [
        f"{books}/t.tgz: c.txt",
        f"{books}/t.tgz: d.jsonl:2",
    ]
    body = (books / "t.tgz").read_bytes()
    for cut in range(0, len(body), 7):
        (books / "t.tgz").write_bytes(body[:cut])
        assert read(books)[0]["a"] == "a"


def test_names_that_are_bytes_are_escaped(tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff"
    Path(os.fsdecode(folder)).mkdir()
    for name in (b"\xe9.txt", b"\xe9.jsonl", b"\xe9.md"):
        Path(os.fsdecode(folder + b"/" + name)).write_text('{"text": "x"}\n[1]')
    found, unread = read(os.fsdecode(folder))
    assert {*found} == {r"\xe9", r"\xe9:1"}
    for line in [*unread.lines(), split_source(os.fsdecode(folder))[0]]:
        assert line.encode() and r"\x" in line


@pytest.mark.parametrize(
    "place", ["", " ", "x" * 300, "a/" * 3000, "a\0b", "~nobody-here/x", "\ud83d", "=", "a=", "books/../nowhere.txt"]
)
def test_places_that_cannot_be_are_named_in_a_dry_run(place):
    (problem,) = missing_sources([place])
    assert "does not exist" in problem


def test_a_folder_without_texts_says_what_it_holds(tmp_path):
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(UserError, match=r"holds no text: 1 file passed over: 1 \.md \(a\.md\)"):
        read(tmp_path)
    (tmp_path / "a.md").unlink()
    with pytest.raises(UserError, match=r"holds no text: there is no file of \.txt"):
        read(tmp_path)
