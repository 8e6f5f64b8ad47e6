"""Documents of named sources: Python's own, files and folders, data sets of the hub, synthetic ones."""

from __future__ import annotations

import itertools
import json
import math
import re
import sysconfig
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bdcli.base.errors import UserError
from bdcli.base.files import digest
from bdcli.base.texts import decode_text, read_text
from bdcli.data.prompts import HELD_OUT, stdlib_text
from bdcli.data.synthetic import recall_documents

HELD_OUT_SHARE = 0.08  # of the documents of a file or folder; stdlib has a list of its own
KNOWN = {"pg19": "emozilla/pg19", "lwm": "deepmind/narrativeqa"}  # names of data sets on the hub
LONGBENCH = "longbench"  # or longbench/TASK: on the hub too, but as a data.zip
INSTRUCTIONS = {"lwm": "\n\nSummary of the text above:"}  # after each document, as the paper's LWM set asks for
_TARS = (".tar", ".tar.gz", ".tar.xz", ".tar.bz2")
KINDS = (".txt", ".jsonl", ".parquet", *_TARS)
TOKEN_CHARACTERS = 8  # of text to read from a hub data set for each token wanted
TEXT_FIELDS = ("text", "context", "document_text", "content")
_NAMED = re.compile(r"([\w-]+(?:/[\w-]+)?)=(.+)")
_SKIPPED = ("test", "tests", "idlelib", "site-packages", "lib2to3", "__pycache__")


@dataclass(frozen=True)
class Document:
    """A text. `held_out`: it is for measuring and never trained on.

    `question` is what a prompt ends with after the text: a row's own, or the instruction of the data set.
    """

    name: str
    text: str
    held_out: bool
    question: str = ""


def split_source(source: str) -> tuple[str, str]:
    """(name of the data set, where it is) of `NAME=PLACE`, of a known name, or of a place named after itself."""
    named = _NAMED.fullmatch(source)
    if named and not Path(source).expanduser().exists():
        return named[1], named[2]
    known = source in KNOWN or source.split("/")[0] == LONGBENCH
    return source if known else Path(source).name.split(".")[0], source


def documents(source: str, broken: list[str] | None = None, enough: float = math.inf) -> Iterator[Document]:
    """Documents of a source: `stdlib`, `recall`, a file or a folder of KINDS, `pg19`, `lwm`, `longbench`,
    `longbench/TASK`, any hub data set, or NAME=PLACE to give any of them a name.

    Files of a folder and members of a tar that are not UTF-8 go into `broken` by name; without it they are errors.
    A hub data set ends after `enough` characters. Raises UserError where a source is missing or cannot be read.
    """
    name, place = split_source(source)
    instruction, path = INSTRUCTIONS.get(name, ""), Path(place).expanduser()
    if place == "stdlib":
        found = _stdlib()
    elif place == "recall":
        found = (Document(title, text, is_held_out(title)) for title, text in recall_documents())
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.name.endswith(KINDS))
        if not files:
            raise UserError(f"data source {place} holds no file of {', '.join(KINDS)}", "Point at a folder of text")
        found = itertools.chain.from_iterable(_file(file, broken) for file in files)
    elif path.is_file():
        found = _file(path, broken)
    elif place.split("/")[0] == LONGBENCH:
        found = _longbench(place.partition("/")[2])
    elif place in KNOWN or (place.count("/") == 1 and not place.startswith((".", "/", "~"))):
        found = _hub(KNOWN.get(place, place), enough)
    else:
        raise UserError(f"data source {place} does not exist", "Give stdlib, a file, a folder, or a hub name")
    yield from (replace(d, question=instruction) for d in found) if instruction else found


def missing_sources(sources: Sequence[str]) -> Iterator[str]:
    """What is wrong with each source that gives no document."""
    for source in sources:
        try:
            if next(documents(source, []), None) is None:
                yield f"data source {source} holds no text"
        except UserError as error:
            yield str(error)


def _stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if any(part in _SKIPPED for part in parts) or parts[0] in HELD_OUT:
            continue
        try:
            yield Document("/".join(parts), path.read_text("utf-8"), False)
        except UnicodeDecodeError:
            continue
    yield Document("held out", stdlib_text(), True)


def _file(path: Path, broken: list[str] | None) -> Iterator[Document]:
    if not path.name.endswith(KINDS):
        raise UserError(f"data source {path} is of no kind that is read", f"Kinds: {', '.join(KINDS)}")
    if path.suffix == ".jsonl":
        yield from _json_rows(path.stem, path.read_text("utf-8"), str(path))
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        for name, data in _tar_members(path) if path.name.endswith(_TARS) else [(path.stem, None)]:
            try:
                yield Document(name, _text(name, data, path), is_held_out(name))
            except UserError:
                if broken is None:
                    raise
                broken.append(name)


def _text(name: str, data: bytes | None, path: Path) -> str:
    """Text of the file `path`, or `data` of the member `name` of that archive."""
    return read_text(path) if data is None else decode_text(data, f"{path}: {name}")


def _tar_members(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile():
                    yield Path(member.name).stem, archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error})", "Give a tar of UTF-8 texts") from None


def _json_rows(name: str, text: str, where: str) -> Iterator[Document]:
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}:{number} is not JSON ({error.msg})", "Mend or remove the line") from None
        yield _row(f"{name}:{number}", row, f"{where}:{number}")


def _parquet_rows(path: Path) -> Iterator[Document]:
    from datasets import Dataset

    for number, row in enumerate(Dataset.from_parquet(str(path))):
        yield _row(f"{path.stem}:{number}", row, f"{path} row {number}")


def _hub(name: str, enough: float) -> Iterator[Document]:
    """Documents of a hub data set, read as they come, each once where several rows ask about it."""
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train", streaming=True)
    except Exception as error:  # the library raises many kinds, those of its HTTP layer among them
        hint = f"Where there is a network: hf download --repo-type dataset {name}; then give its folder"
        raise UserError(
            f"data set {name} is not here and the hub did not answer ({type(error).__name__})", hint
        ) from None
    read, before = 0, ""
    for number, row in enumerate(rows):
        document = _row(f"{name}:{number}", row, f"{name}:{number}")
        if document.text != before:
            yield document
            read, before = read + len(document.text), document.text
        if read > enough:
            return


def _longbench(task: str) -> Iterator[Document]:
    """Rows of a LongBench task, or of all, straight from the data.zip on the hub; no data-set script is run."""
    import zipfile

    from huggingface_hub import hf_hub_download

    name = f"{LONGBENCH}/{task}" if task else LONGBENCH
    try:
        archive = zipfile.ZipFile(hf_hub_download("THUDM/LongBench", "data.zip", repo_type="dataset"))
    except Exception as error:  # the hub raises many kinds, those of its HTTP library among them
        hint = "Where there is a network: hf download --repo-type dataset THUDM/LongBench data.zip; "
        raise UserError(
            f"{name} is not here and the hub did not answer ({type(error).__name__})",
            hint + f"then unzip it and give {name}={'FILE.jsonl' if task else 'FOLDER'}",
        ) from None
    with archive:
        inside = [f"data/{task}.jsonl"] if task else sorted(n for n in archive.namelist() if n.endswith(".jsonl"))
        for member in inside:
            try:
                text = archive.read(member).decode("utf-8")
            except KeyError:
                hint = "See https://huggingface.co/datasets/THUDM/LongBench"
                raise UserError(f"LongBench has no task {task}", hint) from None
            yield from _json_rows(f"{LONGBENCH}/{Path(member).stem}", text, f"LongBench {member}")


def _row(name: str, row: dict, where: str) -> Document:
    """A row of a data set: its text under one of TEXT_FIELDS, or inside `document`; LongBench's `input` asks."""
    inner = row.get("document")
    for holder in (row, inner if isinstance(inner, dict) else {}):
        for field in TEXT_FIELDS:
            if isinstance(holder.get(field), str):
                question = f"\n\n{row['input']}" if row.get("input") and field == "context" else ""
                return Document(name, holder[field], is_held_out(name), question)
    raise UserError(f"{where} has none of the fields {', '.join(TEXT_FIELDS)}", "Name the text field `text`")


def is_held_out(name: str) -> bool:
    """Whether a document of this name is for measuring; a function of the name alone."""
    return int(digest(name.encode())[:8], 16) < HELD_OUT_SHARE * 2**32
