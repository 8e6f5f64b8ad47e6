"""Rows of data sets: JSON lines and parquet, with every kind of odd row among good ones."""

import bz2
import codecs
import gzip
import json
import lzma
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bdcli.base.errors import UserError
from bdcli.data.document import Unread
from bdcli.data.samples import load_samples
from bdcli.data.sources import documents
from bdcli.data.split import TrainingDocuments

GOOD = [f"row {i} " * 8 for i in range(3)]
ODD = {
    "list": b"[1]",
    "string": b'"x"',
    "number": b"1",
    "null": b"null",
    "true": b"true",
    "NaN": b"NaN",
    "empty object": b"{}",
    "null text": b'{"text": null}',
    "number text": b'{"text": 3}',
    "NaN text": b'{"text": NaN}',
    "list text": b'{"text": ["a"]}',
    "nested text": b'{"text": {"text": "a"}}',
    "null document": b'{"document": null}',
    "list document": b'{"document": ["a"]}',
    "lone surrogate": rb'{"text": "a \ud83d b"}',
    "lone surrogate in a question": rb'{"context": "a", "input": "\udc00"}',
    "question that is no text": b'{"context": "a", "input": {"b": 1}}',
    "latin-1": '{"text": "é"}'.encode("latin-1"),
    "raw surrogate": b'{"text": "\xed\xa0\xbd"}',
    "overlong": b'{"text": "\xc0\x80"}',
    "UTF-16": '{"text": "a"}'.encode("utf-16-le"),
    "truncated": b'{"text": "abc',
    "two objects": b'{"text": "a"}{"text": "b"}',
    "line feed as text": b'{"text": "a\x0bb"}',
    "deep": b"[" * 200_000,
    "deep object": b'{"a":' * 200_000,
    "long number": b'{"text": ' + b"1" * 5000 + b"}",
    "plain text": b"Call me Ishmael.",
}
PACKED = {".gz": gzip.compress, ".BZ2": bz2.compress, ".xz": lambda body: lzma.compress(body, preset=0)}


def lines(*rows):
    return b"\n".join(rows) + b"\n"


def row(text, **more):
    return json.dumps({"text": text} | more).encode()


def read(path):
    unread = Unread()
    return list(documents(str(path), unread)), unread


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_row_is_named_and_the_rest_is_read(kind, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(row(GOOD[0]), ODD[kind], row(GOOD[1]), row(GOOD[2])))
    found, unread = read(tmp_path)
    assert [d.text for d in found] == GOOD and [d.name for d in found] == ["a:1", "a:3", "a:4"]
    assert unread.failed == 1 and unread.failures[0].startswith(f"{tmp_path / 'a.jsonl'}:2 "), unread.failures
    assert TrainingDocuments([str(tmp_path)]).accounts[3] == 1


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x7f", "\ufeff", "\r", "\0", "\N{GRINNING FACE}"])
def test_only_a_line_feed_ends_a_row(mark, tmp_path):
    text = f"one{mark}two"
    raw = json.dumps({"text": text}, ensure_ascii=mark < " ").encode()
    (tmp_path / "a.jsonl").write_bytes(lines(raw, raw))
    found, unread = read(tmp_path)
    assert [d.text for d in found] == [text, text] and not unread.failed


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n", b"\r\n \t\r\n", b" \n\n\n"])
@pytest.mark.parametrize("last", [True, False], ids=["line end at the end", "none"])
def test_marks_line_ends_and_blank_lines_of_other_editors_are_read(end, last, tmp_path):
    body = codecs.BOM_UTF8 + end.join([row("ä b"), row("c"), codecs.BOM_UTF8 + row("d")]) + end * last
    (tmp_path / "a.jsonl").write_bytes(body)
    found, unread = read(tmp_path / "a.jsonl")
    assert [d.text for d in found] == ["ä b", "c", "d"] and not unread.failed
    assert [int(d.name.partition(":")[2]) for d in found] == [1, 1 + end.count(b"\n"), 1 + 2 * end.count(b"\n")]


def test_rows_that_are_unusual_and_right_are_read(tmp_path):
    rows = [
        b'{"text": "a", "text": "b"}',
        b'{"text": null, "content": "c"}',
        b'{"score": NaN, "text": "d"}',
        b'{"document": {"text": "e"}}',
        rb'{"text": "\ud83d\ude00"}',
        b'{"context": "f", "input": null}',
        b'{"context": "g", "input": "h"}',
        b'{"text": ""}',
    ]
    (tmp_path / "a.jsonl").write_bytes(lines(*rows))
    found, unread = read(tmp_path)
    assert [d.text for d in found] == ["b", "c", "d", "e", "\N{GRINNING FACE}", "f", "g", ""]
    assert [d.question for d in found][5:7] == ["", "\n\nh"] and not unread.failed
    read_, kept, dropped, failed = TrainingDocuments([str(tmp_path)]).accounts
    assert (read_, failed) == (8, 0) and kept + dropped["held out"] + dropped["empty"] == 8 and dropped["empty"] >= 0


def test_a_row_of_50_mb_is_a_row(tmp_path):
    text = "word " * 10_000_000
    (tmp_path / "a.jsonl").write_bytes(lines(row("small"), b'{"text": "' + text.encode() + b'"}', b'{"text": "a'))
    found, unread = read(tmp_path)
    assert [len(d.text) for d in found] == [5, len(text)] and unread.failed == 1


@pytest.mark.parametrize("body", [b"", b"\n\n", codecs.BOM_UTF8], ids=["empty", "blank lines", "only a mark"])
def test_a_file_without_rows_is_named(body, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(body)
    with pytest.raises(UserError, match=r"a\.jsonl holds no row"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_text("text")
    assert "a.jsonl holds no row" in read(tmp_path)[1].failures[0]


def test_a_file_in_which_nothing_can_be_read_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(*[ODD["latin-1"]] * 5))
    with pytest.raises(UserError, match=r"5 rows or files failed, first .*a\.jsonl:1 is not UTF-8 \(byte 10\)"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "u.jsonl").write_bytes(lines(row("a"), row("b")).decode().encode("utf-16"))
    with pytest.raises(UserError, match=r"u\.jsonl is UTF-16"):
        read(tmp_path / "u.jsonl")


@pytest.mark.parametrize("suffix", PACKED)
def test_compressed_rows_are_read_up_to_where_they_are_damaged(suffix, tmp_path):
    path, pack = tmp_path / f"a.jsonl{suffix}", PACKED[suffix]
    rng = random.Random(5)
    body = lines(*(row(f"{i} {rng.getrandbits(800):x}") for i in range(2000)))
    path.write_bytes(pack(body))
    whole, unread = read(path)
    assert len(whole) == 2000 and whole[7].name == "a:8" and not unread.failed
    path.write_bytes(pack(body)[: -len(pack(body)) // 3])
    (tmp_path / "z.txt").write_text("the end")  # bz2 gives nothing of its last block
    *found, last = documents(str(tmp_path), unread)
    assert found == whole[: len(found)] and last.text == "the end"
    assert unread.failed == 1 and "cannot be read" in unread.failures[0]
    path.write_bytes(b"no archive at all")
    with pytest.raises(UserError, match=r"a\.jsonl\..*cannot be read"):
        read(path)


def parquet(path, columns):
    pq.write_table(pa.table(columns), path)
    return path


COLUMNS = {
    "large strings": pa.array(GOOD, pa.large_string()),
    "dictionary": pa.array(GOOD).dictionary_encode(),
    "string view": pa.array(GOOD, pa.string_view()),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_strings_of_every_kind_of_column_are_read(kind, tmp_path):
    path = parquet(tmp_path / "A.PARQUET", {"number": [1, 2, 3], "text": COLUMNS[kind]})
    found, unread = read(path)
    assert [(d.name, d.text) for d in found] == [(f"A:{i}", text) for i, text in enumerate(GOOD)] and not unread.failed


@pytest.mark.parametrize(
    "column",
    [
        [1, 2],
        [None, None],
        [["a"], []],
        [{"text": "a"}, None],
        [b"a", b"\xff"],
        pa.array([1.5, None], pa.float16()),
        pa.array([2**62, 1], pa.timestamp("ns")),
    ],
    ids=str,
)
def test_columns_of_other_types_are_failed_rows(column, tmp_path):
    parquet(tmp_path / "q.parquet", {"text": column})
    (tmp_path / "a.txt").write_text("text")
    found, unread = read(tmp_path)
    assert [d.text for d in found] == ["text"] and unread.failed == 2
    assert unread.failures[1].startswith(f"{tmp_path / 'q.parquet'} row 1 ")


def test_odd_rows_of_a_parquet_file_are_named(tmp_path):
    damaged = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", b"c"]).buffers())
    table = {"text": pa.chunked_array([pa.array([GOOD[0], None, ""]), damaged]), "n": range(6)}
    found, unread = read(parquet(tmp_path / "q.parquet", table))
    assert [d.text for d in found] == [GOOD[0], "", "a", "c"] and unread.failed == 2
    assert [line.partition(".parquet ")[2][:6] for line in unread.failures] == ["row 1 ", "row 4 "]
    inner = {"document": [{"text": "inner", "id": 1}, {"text": "two", "id": 2}]}
    found, _ = read(parquet(tmp_path / "n.parquet", inner))
    assert [d.text for d in found] == ["inner", "two"]


def test_damaged_parquet_files_are_named_and_never_end_a_run(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    rng, path = random.Random(7), tmp_path / "q.parquet"
    rows = pa.table({"text": [f"{i} {rng.random()}" for i in range(2000)]})
    pq.write_table(rows, path, row_group_size=500, compression="none")
    whole = path.read_bytes()
    for body in (b"", b"PAR1", b"PAR1PAR1", whole[:-1], whole[:4000], whole[: len(whole) // 2], b"x" * 99):
        path.write_bytes(body)
        found, unread = read(tmp_path)
        assert [d.text for d in found] == ["text"] and unread.failed == 1
        assert "q.parquet cannot be read" in unread.failures[0]
    body = bytearray(whole)
    for _ in range(60):  # bytes of data pages, whose headers may then lie
        place = rng.randrange(4, len(body) - 3000)
        body[place] = rng.randrange(256)
        path.write_bytes(body)
        read(tmp_path)
    path.unlink()
    parquet(path, {"words": ["a"]})
    assert "q.parquet has none of the columns" in read(tmp_path)[1].failures[0]
    parquet(path, {"text": pa.array([], pa.string())})
    assert "q.parquet holds no row" in read(tmp_path)[1].failures[0]


def test_odd_rows_among_a_thousand_end_neither_training_nor_measuring(tmp_path, pocket):
    good = [row(f"text {i} " * 40) for i in range(1000)]
    for n, odd in enumerate(ODD.values()):
        good.insert(37 * n, odd)
    (tmp_path / "a.jsonl").write_bytes(lines(*good))
    source = TrainingDocuments([str(tmp_path)])
    read_, kept, dropped, failed = source.accounts
    assert failed == len(ODD) and read_ == len(good) == kept + sum(dropped.values()) + failed
    assert len(list(source.windows(pocket[2], 200, seed=0))) > 100
    unread = Unread()
    samples = load_samples(pocket[2], "a", [str(tmp_path / "a.jsonl")], 30, 64, unread=unread)
    assert len(samples) == 30 and unread.failed > 0
    line = next(source.unread.lines())
    assert line.startswith(f"{len(ODD)} rows or files could not be read: {tmp_path}/a.jsonl:1 ")
