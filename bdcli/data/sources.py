"""Text for training and measuring: documents from named sources, split by document, cut into windows of token ids."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import sysconfig
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bdcli.base.errors import UserError
from bdcli.base.files import digest
from bdcli.data.prompts import HELD_OUT, encode, stdlib_text
from bdcli.data.synthetic import recall_documents

HELD_OUT_SHARE = 0.08  # of the documents of a file or folder; stdlib has a list of its own
KNOWN = {"pg19": "emozilla/pg19", "lwm": "deepmind/narrativeqa"}  # names of data sets on the hub
LONGBENCH = "longbench"  # or longbench/TASK: on the hub too, but as a data.zip
INSTRUCTIONS = {"lwm": "\n\nSummary of the text above:"}  # after each document, as the paper's LWM set asks for
_TARS = (".tar", ".tar.gz", ".tar.xz", ".tar.bz2")
KINDS = (".txt", ".jsonl", ".parquet", *_TARS)
CHARACTERS = 8  # of text to read from a hub data set for each token wanted
TEXT_FIELDS = ("text", "context", "document_text", "content")
_NAMED = re.compile(r"([\w-]+(?:/[\w-]+)?)=(.+)")
_SKIPPED = ("test", "tests", "idlelib", "site-packages", "lib2to3", "__pycache__")


@dataclass(frozen=True)
class Document:
    """`question` is what a prompt ends with after the text: a row's own, or the instruction of the data set."""

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
    A hub data set ends after `enough` characters.
    """
    name, place = split_source(source)
    instruction, path = INSTRUCTIONS.get(name, ""), Path(place).expanduser()
    if place == "stdlib":
        found = _stdlib()
    elif place == "recall":
        found = (Document(title, text, _chosen_for_measuring(title)) for title, text in recall_documents())
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
        for name, data in _tar_members(path) if path.name.endswith(_TARS) else [(path.stem, path.read_bytes())]:
            try:
                yield Document(name, data.decode("utf-8"), _chosen_for_measuring(name))
            except UnicodeDecodeError as error:
                if broken is None:
                    raise UserError(f"{path}: {name} is not UTF-8 (byte {error.start})", "Convert it first") from None
                broken.append(name)


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
                return Document(name, holder[field], _chosen_for_measuring(name), question)
    raise UserError(f"{where} has none of the fields {', '.join(TEXT_FIELDS)}", "Name the text field `text`")


def _chosen_for_measuring(name: str) -> bool:
    return int(digest(name.encode())[:8], 16) < HELD_OUT_SHARE * 2**32


@dataclass(frozen=True)
class Candidate:
    """A training window to be. `asked`: the ids end with a question, and what follows is the target's to write."""

    ids: list[int]
    asked: bool = False


class Documents:
    """Training documents of several sources. accounts: (read, kept, dropped by reason, failed), which add up."""

    def __init__(self, sources: Sequence[str], enough: float = math.inf):
        broken: list[str] = []
        found = [d for source in sources for d in documents(source, broken, enough)]
        self._kept = [d for d in found if d.text and not d.held_out]
        dropped = {"held out": sum(d.held_out for d in found), "empty": sum(not (d.text or d.held_out) for d in found)}
        self.accounts = len(found) + len(broken), len(self._kept), dropped, len(broken)

    def windows(self, tokenizer, length: int, seed: int, answer: int = 0) -> Iterator[Candidate]:
        """Windows of `length` ids, one after another, of the documents in random order, joined by EOS.

        With `answer`, a document that ends with a question also gives the `length` - `answer` ids up to there.
        """
        kept = list(self._kept)
        random.Random(seed).shuffle(kept)
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        rest: list[int] = []
        before: list[int] = []
        for document in kept:
            ids = encode(tokenizer, document.text + document.question)
            if answer:
                before = (before + ids)[answer - length :]
                if document.question and len(before) == length - answer:
                    yield Candidate(before, asked=True)
                before = before + end
            rest += ids + end
            whole = len(rest) // length * length
            yield from (Candidate(rest[at : at + length]) for at in range(0, whole, length))
            del rest[:whole]


def held_out_prompts(
    tokenizer, sources: Sequence[str], length: int, count: int, everything: bool = False
) -> list[tuple[str, list[int]]]:
    """(data set, ids) of `count` prompts of `length` tokens from held-out documents, or from any with `everything`.

    The prompts end at places that depend on `count` only, those of a document with a question at its end, once:
    prompts of several lengths end at the same tokens.
    """
    found: list[tuple[str, list[int]]] = []
    for source in sources:
        name, here = split_source(source)[0], count // len(sources) + (len(found) < count % len(sources))
        usable: list[tuple[list[int], bool]] = []
        for d in documents(source) if here else ():
            ids = encode(tokenizer, d.text + d.question) if d.held_out or everything else []
            if len(ids) > length:
                usable.append((ids, bool(d.question)))
            if len(usable) == here:
                break
        for n in range(here if usable else 0):
            (text, asks), nth = usable[n % len(usable)], n // len(usable)
            of = -(-here // len(usable))
            end = len(text) if asks else int(len(text) * (nth + 1) / (of + 1))
            if end >= length and not (asks and nth):
                found.append((name, text[end - length : end]))
    if not found:
        raise UserError(
            f"no held-out document of {', '.join(sources)} has {length} tokens", "Lower evaluation.contexts"
        )
    return found


def measured_windows(tokenizer, sources: Sequence[str], length: int, count: int, everything: bool) -> list[list[int]]:
    """Up to `count` windows of `length` ids from the middles of documents, in turn from each source.

    `everything` takes any document (a source kept for measuring), else only held-out ones.
    """
    pools = []
    for source in sources:
        pool = []
        for doc in documents(source):
            if doc.held_out or everything:
                ids = encode(tokenizer, doc.text)
                if len(ids) >= length:
                    start = (len(ids) - length) // 2
                    pool.append(ids[start : start + length])
            if len(pool) == count:
                break
        pools.append(pool)
    found = [window for row in itertools.zip_longest(*pools) for window in row if window is not None]
    if not found:
        raise UserError(
            f"no held-out document of {', '.join(sources)} has {length} tokens", "Lower held_out.contexts or add text"
        )
    return found[:count]
