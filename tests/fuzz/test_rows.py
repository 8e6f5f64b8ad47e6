"""Rows and files of training data: whatever the bytes, each row is a document or a named failure."""

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from bdcli.base.errors import UserError
from bdcli.data.document import Unread
from bdcli.data.rows import TEXT_FIELDS
from bdcli.data.sources import documents, split_source
from tests.support.fuzz import JSON, WORDS, fuzz, mutated

FIELDS = st.sampled_from([*TEXT_FIELDS, "document", "input", "other"])
OBJECTS = st.dictionaries(FIELDS, JSON | st.fixed_dictionaries({"text": WORDS}), max_size=3)
ROWS = (OBJECTS | JSON).map(lambda row: json.dumps(row).encode()) | st.binary(max_size=30)
ENDS = st.sampled_from([b"\n", b"\r\n", b"\n\n"])
LINES = st.builds(lambda end, rows: end.join(rows), ENDS, st.lists(ROWS, max_size=8))
SUFFIXES = st.sampled_from(["txt", "TXT", "jsonl.gz", "txt.bz2", "txt.xz", "tar", "tar.gz", "tgz"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder beside whose odd file there is always a good one."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "zz.txt").write_text("the end")
    return folder


def read(folder):
    unread = Unread()
    *found, last = documents(str(folder), unread)
    assert last.text == "the end"
    for document in found:
        assert (document.text + document.question + document.name).encode() is not None
    assert all(line.encode() for line in [*unread.failures, *unread.lines()])
    return found, unread


def plain_count(body):
    """Rows that hold something, by the plainest reading."""
    return sum(bool(line.removeprefix(codecs.BOM_UTF8).strip()) for line in body.split(b"\n"))


@fuzz(300)
@given(LINES, st.booleans())
@example(b'{"text": "a\xe2\x80\xa8b"}\n\xef\xbb\xbf{"text": "\xc2\x85"}', True)
@example(b'{"text": ' + b"1" * 5000 + b"}\n" + b"[" * 20_000, False)
def test_every_row_is_read_or_named(folder, body, mark):
    (folder / "a.jsonl").write_bytes(codecs.BOM_UTF8 * mark + body)
    found, unread = read(folder)
    if unread.failures[:1] and "a.jsonl is UTF-16" in unread.failures[0]:
        return
    assert len(found) + unread.failed == max(plain_count(codecs.BOM_UTF8 * mark + body), 1)
    for document in found:
        row = json.loads(body.split(b"\n")[int(document.name.partition(":")[2]) - 1].removeprefix(codecs.BOM_UTF8))
        inner = row.get("document")
        assert document.text in [*row.values(), *(inner.values() if isinstance(inner, dict) else ())]


@fuzz(150)
@given(SUFFIXES, st.binary(max_size=600))
def test_a_file_of_any_bytes_is_read_or_named(folder, suffix, body):
    path = folder / f"a.{suffix}"
    path.write_bytes(body)
    try:
        found, unread = read(folder)
        assert found or unread.failed
    finally:
        path.unlink()


@fuzz(100)
@given(st.data())
def test_an_edited_archive_is_read_or_named(folder, archives, data):
    name = data.draw(st.sampled_from(sorted(archives)))
    path = folder / name
    path.write_bytes(data.draw(mutated(archives[name])))
    try:
        read(folder)
    finally:
        path.unlink()


@pytest.fixture(scope="module")
def archives():
    """Small archives by name."""
    rows = b"".join(json.dumps({"text": f"row {i}"}).encode() + b"\n" for i in range(40))
    found = {"a.jsonl.gz": gzip.compress(rows), "a.jsonl.bz2": bz2.compress(rows), "a.txt.xz": lzma.compress(rows)}
    for kind in ("", "gz", "xz"):
        body = io.BytesIO()
        with tarfile.open(fileobj=body, mode=f"w:{kind}") as archive:
            for member in ("a.txt", "b.jsonl"):
                info = tarfile.TarInfo(member)
                info.size = len(rows)
                archive.addfile(info, io.BytesIO(rows))
        found[f"a.tar.{kind}".rstrip(".")] = body.getvalue()
    return found


@pytest.mark.usefixtures("offline")
@fuzz(150)
@given(st.text() | st.text(alphabet="/=.~ \0\ud800\udcffpg19", max_size=30))
def test_a_source_that_is_not_there_is_refused(name):
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # no path can be so called
        assume(not Path(split_source(name)[1]).expanduser().exists())
    with pytest.raises(UserError):
        next(documents(name))


@pytest.fixture(scope="module")
def offline():
    """No test asks the hub."""

    def refuse(*_, **__):
        raise ConnectionError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.load_dataset", refuse)
        patch.setattr("huggingface_hub.hf_hub_download", refuse)
        yield
