"""Documents of named sources: Python's own, files and folders, data sets of the hub, synthetic ones."""

from __future__ import annotations

import itertools
import math
import re
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from bdcli.base.errors import UserError
from bdcli.data.document import Document, Unread, UnreadableError, is_held_out, printable
from bdcli.data.encoding import DAMAGED, reason
from bdcli.data.files import KINDS, check_file, file_documents, folder_files
from bdcli.data.prompts import HELD_OUT, stdlib_text
from bdcli.data.rows import json_rows, row_document
from bdcli.data.synthetic import recall_documents

KNOWN = {"pg19": "emozilla/pg19", "lwm": "deepmind/narrativeqa"}  # names of data sets on the hub
LONGBENCH = "longbench"  # or longbench/TASK: on the hub too, but as a data.zip
INSTRUCTIONS = {"lwm": "\n\nSummary of the text above:"}  # after each document, as the paper's LWM set asks for
TOKEN_CHARACTERS = 8  # of text to read from a hub data set for each token wanted
_NAMED = re.compile(r"([\w-]+(?:/[\w-]+)?)=(.+)")
_SKIPPED = ("test", "tests", "idlelib", "site-packages", "lib2to3", "__pycache__")


def split_source(source: str) -> tuple[str, str]:
    """(name of the data set, where it is) of `NAME=PLACE`, of a known name, or of a place named after itself."""
    named = _NAMED.fullmatch(source)
    if named and _file_mode(source) is None:
        return named[1], named[2]
    known = source in KNOWN or source.split("/")[0] == LONGBENCH
    return source if known else printable(Path(source).name.split(".")[0]), source


def documents(source: str, unread: Unread | None = None, enough: float = math.inf) -> Iterator[Document]:
    """Documents of a source: `stdlib`, `recall`, a file or a folder of KINDS, `pg19`, `lwm`, `longbench`,
    `longbench/TASK`, any hub data set, or NAME=PLACE to give any of them a name.

    Rows and files that cannot be read, and files passed over, are counted in `unread`. A hub data set ends after
    `enough` characters. Raises UserError where a source is missing or holds nothing that can be read.
    """
    unread = Unread() if unread is None else unread
    failed = unread.failed
    name, place = split_source(source)
    instruction, found = INSTRUCTIONS.get(name, ""), 0
    for document in _documents(place, unread, enough):
        found += 1
        yield replace(document, question=instruction) if instruction else document
    if not found:
        raise UserError(_why_nothing(place, unread, failed), "Give texts in UTF-8")


def _why_nothing(place: str, unread: Unread, failed: int) -> str:
    """That a source gave no document, with the first cause; `failed` is how many failures came before it."""
    causes = unread.failures[failed:]
    if len(causes) == 1:
        return causes[0]
    why = f"{len(causes)} rows or files failed, first {causes[0]}" if causes else "; ".join(unread.lines())
    return f"data source {place} holds no text: {why or 'there is no file of ' + ', '.join(KINDS)}"


def _documents(place: str, unread: Unread, enough: float) -> Iterator[Document]:
    path, mode = Path(place), _file_mode(place)
    if place == "stdlib":
        return _stdlib()
    if place == "recall":
        return (Document(title, text, is_held_out(title)) for title, text in recall_documents())
    if mode is not None and stat.S_ISDIR(mode):
        files = folder_files(path.expanduser(), unread)
        return itertools.chain.from_iterable(file_documents(file, unread) for file in files)
    if mode is not None:
        if not stat.S_ISREG(mode):
            raise UserError(f"data source {place} is no file", "Give stdlib, a file, a folder, or a hub name")
        check_file(path)
        return file_documents(path.expanduser(), unread)
    if place.split("/")[0] == LONGBENCH:
        return _longbench(place.partition("/")[2], unread)
    if place in KNOWN or (place.count("/") == 1 and not place.startswith((".", "/", "~"))):
        return _hub(KNOWN.get(place, place), unread, enough)
    name = place if place.strip() else repr(place)
    raise UserError(f"data source {name} does not exist", "Give stdlib, a file, a folder, or a hub name")


def _file_mode(place: str) -> int | None:
    """What stands at a path, as `stat` has it; None where nothing does or no path can be so named."""
    try:
        return Path(place).expanduser().stat().st_mode if place.strip() else None
    except (OSError, ValueError, RuntimeError):
        return None


def missing_sources(sources: Sequence[str]) -> Iterator[str]:
    """What is wrong with each source that gives no document."""
    for source in sources:
        try:
            next(documents(source))
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


def _hub(name: str, unread: Unread, enough: float) -> Iterator[Document]:
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
    for number, row in enumerate(_streamed(name, rows)):
        try:
            document = row_document(f"{name}:{number}", row)
        except UnreadableError as error:
            unread.fail(f"{name}:{number}", error)
            continue
        if document.text != before:
            yield document
            read, before = read + len(document.text), document.text
        if read > enough:
            return


def _streamed(name: str, rows: Iterable) -> Iterator:
    """Rows as they come. Raises UserError where they end too early."""
    number = 0
    try:
        for row in rows:
            number += 1
            yield row
    except Exception as error:  # as above
        hint = f"Try again, or: hf download --repo-type dataset {name}; then give its folder"
        raise UserError(f"data set {name} broke off after {number} rows ({type(error).__name__})", hint) from None


def _longbench(task: str, unread: Unread) -> Iterator[Document]:
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
                with archive.open(member) as file:
                    yield from json_rows(f"{LONGBENCH}/{Path(member).stem}", file, f"LongBench {member}", unread)
            except KeyError:
                hint = "See https://huggingface.co/datasets/THUDM/LongBench"
                raise UserError(f"LongBench has no task {task}", hint) from None
            except DAMAGED as error:
                unread.fail(f"LongBench {member}", f"cannot be read ({reason(error)})")
