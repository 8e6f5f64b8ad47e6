"""Standard streams that fail, are closed or know few characters; and bytes of names that are no UTF-8."""

import errno
import io
import json
import sys

import pytest

from bdcli.base.console import note
from bdcli.base.errors import OutputError
from bdcli.base.streams import (
    check_output,
    prepare_streams,
    printable,
    write,
    write_exactly,
    write_json,
    write_line,
)


class Failing(io.StringIO):
    """A stream that cannot be written, from its second write on."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def flush(self):
        if len(self.getvalue()) > 3:
            raise OSError(self.number, "as the system says it")


@pytest.fixture
def streams(monkeypatch):
    """Set stdout and stderr for a test, as a command finds them."""

    def use(stdout, stderr=None):
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setattr(sys, "stdin", None)
        prepare_streams()
        prepare_streams()

    return use


def encoded(encoding):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)


@pytest.mark.parametrize(
    ("number", "code", "quiet"), [(errno.EPIPE, 141, True), (errno.EIO, 141, True), (errno.ENOSPC, 1, False)]
)
def test_the_first_write_that_fails_raises_and_later_ones_are_dropped(streams, number, code, quiet):
    streams(Failing(number))
    write("one")
    check_output()
    with pytest.raises(OutputError) as failure:
        write("two")
    assert failure.value.exit_code == code and failure.value.quiet is quiet
    write("three")
    with pytest.raises(OutputError, match="kept as run 7"):
        check_output("The text is kept as run 7")


def test_notes_that_nobody_can_read_end_nothing(streams):
    streams(io.StringIO(), Failing(errno.EPIPE))
    note("longer than three")
    note("once more")
    assert sys.stdout.getvalue() == ""


def test_streams_that_are_not_there_swallow_what_is_said(streams):
    streams(None, None)
    note("a note")
    write_line("a result")
    assert sys.stdin.buffer.read() == b""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_fits_any_encoding(streams, encoding):
    streams(encoded(encoding))
    write("γ é \udcff")
    write_json({"γ": "é 漢 \udcff"})
    write_exactly("γ\n")
    first, rest = sys.stdout.buffer.getvalue().split(b"{")
    assert first.decode(encoding) == "γ é \udcff".encode(encoding, "replace").decode(encoding)
    document, exact = rest.split(b"}")
    assert json.loads(b"{" + document + b"}") == {"γ": "é 漢 \\xff"}
    assert exact == b"\n\xce\xb3\n"


def test_bytes_of_names_are_escaped_wherever_they_stand():
    assert printable("p\udcff.txt") == r"p\xff.txt"
    assert printable("a \ud83d b") == r"a \ud83d b"
    assert printable({"a\udc80": ["b\udcfe", ("é", 1, None)]}) == {r"a\x80": [r"b\xfe", ["é", 1, None]]}
    assert printable("é\nγ") == "é\nγ"
