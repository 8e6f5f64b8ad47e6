"""Standard streams that are always there, take any text, and end a run in an orderly way when they fail.

stdout carries results: the first write that fails raises OutputError, later ones are dropped. stderr carries notes,
and a note that nobody can read ends nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from pathlib import Path
from typing import TextIO

from bdcli.base.errors import OutputError

READER_GONE = (errno.EPIPE, errno.EIO, errno.ESHUTDOWN)  # a closed pipe, a closed terminal, a closed socket


class _Stream:
    """A text stream whose faults `_failed` handles; all else is the stream's own."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.error: OutputError | None = None

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._failed(error)
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def write_bytes(self, data: bytes) -> None:
        """Bytes as they are, whatever the encoding of the stream."""
        buffer = getattr(self._stream, "buffer", None)
        if buffer is None:  # a stream in memory
            self.write(data.decode())
            return
        try:
            self._stream.flush()
            buffer.write(data)
            buffer.flush()
        except OSError as error:
            self._failed(error)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        self.error = OutputError(error.strerror or str(error), reader_gone=error.errno in READER_GONE)
        with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())


class _Results(_Stream):
    def _failed(self, error: OSError) -> None:
        if self.error is None:
            super()._failed(error)
            raise self.error


def prepare_streams() -> None:
    """Make stdin, stdout and stderr usable whatever the caller has closed or set. May be called again."""
    for number in range(3):  # a closed one would be the number of the next file that is opened
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    if not isinstance(sys.stdout, _Stream):
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        sys.stdout = _Results(sys.stdout)
    if not isinstance(sys.stderr, _Stream):
        sys.stderr = _Stream(sys.stderr)


def write(text: str) -> None:
    """Text on stdout, at once. A character that the terminal does not know is a question mark."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_line(text: object = "") -> None:
    write(f"{text}\n")


def write_exactly(text: str) -> None:
    """Text on stdout as UTF-8 whatever the terminal's encoding is."""
    if isinstance(sys.stdout, _Stream):
        sys.stdout.write_bytes(text.encode())
    else:
        write(text)


def write_json(value: object) -> None:
    """One JSON document on stdout; in ASCII where the stream is not UTF-8, so that nothing is lost."""
    unicode = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
    write_line(json.dumps(printable(value), ensure_ascii=not unicode))


def check_output(hint: str = "") -> None:
    """Raise OutputError where stdout has failed; `hint` says what became of the result."""
    error = getattr(sys.stdout, "error", None)
    if error is not None:
        error.hint = hint or error.hint
        raise error


def printable(value: object) -> object:
    """The value with every byte of a name that is no UTF-8 written as an escape, in nested lists and dicts as well.

    Python has such bytes as lone surrogates, which no encoder takes.
    """
    if isinstance(value, str):
        return value if value.isprintable() else _escaped(value)
    if isinstance(value, dict):
        return {printable(name): printable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable(item) for item in value]
    return value


def _escaped(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode("utf-8", "backslashreplace")
        except UnicodeEncodeError:  # a surrogate that stands for no byte
            return text.encode("utf-8", "backslashreplace").decode()
    return text
