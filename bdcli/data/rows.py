"""Rows of a data set as documents: JSON lines, parquet, and rows that a library hands out.

A row that is odd is counted as failed under its name and never ends what reads it.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from bdcli.data.document import Document, Unread, UnreadableError, is_held_out, printable
from bdcli.data.encoding import DAMAGED, decode_text, is_utf16, reason

TEXT_FIELDS = ("text", "context", "document_text", "content")
_HOLDER, _QUESTION = "document", "input"  # a mapping that may hold the text; LongBench's question
_JSON_KINDS = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
_ROWS_AT_ONCE = 64  # of a parquet file, whose rows may be whole books


def json_rows(name: str, lines: Iterable[bytes], where: str, unread: Unread) -> Iterator[Document]:
    """Documents of JSON lines, each called NAME:LINE. Only a line feed ends a line; blank lines are skipped."""
    number, rows = 0, 0
    try:
        for number, line in enumerate(lines, 1):
            if number == 1 and is_utf16(line):
                unread.fail(where, "is UTF-16, not UTF-8")
                return
            if not line.removeprefix(codecs.BOM_UTF8).strip():
                continue
            rows += 1
            try:
                yield row_document(f"{name}:{number}", _parse(line))
            except UnreadableError as error:
                unread.fail(f"{where}:{number}", error)
    except DAMAGED as error:
        unread.fail(f"{where}:{number + 1}", f"and what follows cannot be read ({reason(error)})")
        return
    if not rows:
        unread.fail(where, "holds no row")


def _parse(line: bytes) -> object:
    text = decode_text(line)
    try:
        return json.loads(text)
    except RecursionError:
        raise UnreadableError("is nested too deeply") from None
    except ValueError as error:  # not JSON, or a number of thousands of digits
        raise UnreadableError(f"is not JSON ({getattr(error, 'msg', 'a number is too long')})") from None


def parquet_rows(path: Path, unread: Unread) -> Iterator[Document]:
    """Documents of a parquet file, each called STEM:ROW."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with path.open("rb") as opened, ParquetFile(opened) as file:
            names = file.schema_arrow.names
            if not {*TEXT_FIELDS, _HOLDER} & {*names}:
                unread.fail(path, f"has none of the columns {', '.join(TEXT_FIELDS)}")
                return
            wanted = [name for name in (*TEXT_FIELDS, _HOLDER, _QUESTION) if name in names]
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=wanted):
                for place in range(batch.num_rows):
                    try:
                        row = dict(zip(batch.schema.names, _values(batch.columns, place)))
                        yield row_document(f"{printable(path.stem)}:{number}", row)
                    except UnreadableError as error:
                        unread.fail(f"{path} row {number}", error)
                    number += 1
    except (pyarrow.ArrowException, *DAMAGED) as error:
        place = f"{path} row {number}" if number else path
        unread.fail(place, f"{'and what follows ' * (number > 0)}cannot be read ({reason(error)})")
        return
    if not number:
        unread.fail(path, "holds no row")


def _values(columns: list, place: int) -> Iterator[object]:
    """The values of a row. Raises UnreadableError where one is not what its column says."""
    for column in columns:
        try:
            yield column[place].as_py()
        except UnicodeDecodeError as error:
            raise UnreadableError(f"is not UTF-8 (byte {error.start})") from None
        except (ValueError, OverflowError, TypeError) as error:
            raise UnreadableError(f"cannot be read ({reason(error)})") from None


def row_document(name: str, row: object) -> Document:
    """A row as a document: its text under one of TEXT_FIELDS, or inside `document`; LongBench's `input` asks.

    Raises UnreadableError where the row has no text.
    """
    if not isinstance(row, Mapping):
        raise UnreadableError(f"is {_JSON_KINDS.get(type(row), 'a number')}, not an object")
    inner = row.get(_HOLDER)
    for holder in (row, inner if isinstance(inner, Mapping) else {}):
        for field in TEXT_FIELDS:
            if isinstance(holder.get(field), str):
                asks = row.get(_QUESTION) if field == "context" else None
                if asks is not None and not isinstance(asks, str):
                    raise UnreadableError(f"has an `{_QUESTION}` that is no text")
                question = f"\n\n{asks}" if asks else ""
                return Document(name, _sound(holder[field]), is_held_out(name), _sound(question))
    odd = next((field for field in TEXT_FIELDS if field in row), None)
    if odd is not None:
        raise UnreadableError(f"has a `{odd}` that is no text")
    raise UnreadableError(f"has none of the fields {', '.join(TEXT_FIELDS)}")


def _sound(text: str) -> str:
    """`text` where it can be written as UTF-8. Raises UnreadableError on half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnreadableError(f"holds half of a surrogate pair (character {error.start})") from None
    return text
