"""Text for training and measuring: documents from named sources, split by document, cut into windows of token ids."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import sysconfig
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bdcli.errors import UserError
from bdcli.prompts import HELD_OUT, encode, stdlib_text
from bdcli.train.recall import recall_documents

HELD_OUT_SHARE = 0.08  # of the documents of a file or folder; stdlib has a list of its own
KNOWN = {"pg19": "emozilla/pg19", "lwm": "deepmind/narrativeqa"}  # names of data sets on the hub
_TARS = (".tar", ".tar.gz", ".tar.xz", ".tar.bz2")
KINDS = (".txt", ".jsonl", ".parquet", *_TARS)
TEXT_FIELDS = ("text", "context", "document_text", "content")
_SKIPPED = ("test", "tests", "idlelib", "site-packages", "lib2to3", "__pycache__")


@dataclass(frozen=True)
class Document:
    name: str
    text: str
    held_out: bool


def documents(source: str, broken: list[str] | None = None) -> Iterator[Document]:
    """Documents of a source: `stdlib`, `recall`, a file or a folder of KINDS, or a hub data set.

    Files of a folder and members of a tar that are not UTF-8 go into `broken` by name; without it they are errors.
    """
    if source == "stdlib":
        yield from _stdlib()
        return
    if source == "recall":
        yield from (Document(name, text, _chosen_for_measuring(name)) for name, text in recall_documents())
        return
    path = Path(source).expanduser()
    source = KNOWN.get(source, source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.name.endswith(KINDS))
        if not files:
            raise UserError(f"data source {source} holds no file of {', '.join(KINDS)}", "Point at a folder of text")
        for file in files:
            yield from _file(file, broken)
    elif path.is_file():
        yield from _file(path, broken)
    elif source.count("/") == 1 and not source.startswith((".", "/", "~")):
        yield from _hub(source)
    else:
        raise UserError(f"data source {source} does not exist", "Give stdlib, a file, a folder, or a hub name")


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
    if path.name.endswith(_TARS):
        rows = _tar_rows(path)
    elif path.suffix == ".txt":
        rows = [(path.stem, path.read_bytes())]
    elif path.suffix == ".jsonl":
        rows = _json_rows(path)
    else:
        rows = _parquet_rows(path)
    for name, text in rows:
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError as error:
                if broken is None:
                    raise UserError(f"{path}: {name} is not UTF-8 (byte {error.start})", "Convert it first") from None
                broken.append(name)
                continue
        yield Document(name, text, _chosen_for_measuring(name))


def _tar_rows(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile():
                    yield Path(member.name).stem, archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error})", "Give a tar of UTF-8 texts") from None


def _json_rows(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            yield f"{path.stem}:{number}", _text_of(json.loads(line), f"{path}:{number}")
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number} is not JSON ({error.msg})", "Mend or remove the line") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, str]]:
    from datasets import Dataset

    for number, row in enumerate(Dataset.from_parquet(str(path))):
        yield f"{path.stem}:{number}", _text_of(row, f"{path} row {number}")


def _hub(name: str) -> Iterator[Document]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train", streaming=True)
    except Exception as error:  # the library raises many kinds, those of its HTTP layer among them
        hint = f"Where there is a network: hf download --repo-type dataset {name}; then give its folder"
        raise UserError(
            f"data set {name} is not here and the hub did not answer ({type(error).__name__})", hint
        ) from None
    for number, row in enumerate(rows):
        title = f"{name}:{number}"
        yield Document(title, _text_of(row, title), _chosen_for_measuring(title))


def _text_of(row: dict, where: str) -> str:
    for field in TEXT_FIELDS:
        if isinstance(row.get(field), str):
            return row[field]
    raise UserError(f"{where} has none of the fields {', '.join(TEXT_FIELDS)}", "Name the text field `text`")


def _chosen_for_measuring(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < HELD_OUT_SHARE * 2**32


class Documents:
    """Training documents of several sources. accounts: (read, kept, dropped by reason, failed), which add up."""

    def __init__(self, sources: Sequence[str]):
        broken: list[str] = []
        found = [d for source in sources for d in documents(source, broken)]
        self._texts = [d.text for d in found if d.text and not d.held_out]
        dropped = {"held out": sum(d.held_out for d in found), "empty": sum(not (d.text or d.held_out) for d in found)}
        self.accounts = len(found) + len(broken), len(self._texts), dropped, len(broken)

    def windows(self, tokenizer, length: int, seed: int) -> Iterator[list[int]]:
        """Windows of `length` ids, one after another, of the documents in random order, joined by EOS."""
        texts = list(self._texts)
        random.Random(seed).shuffle(texts)
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        rest: list[int] = []
        for text in texts:
            rest += encode(tokenizer, text) + end
            whole = len(rest) // length * length
            yield from (rest[at : at + length] for at in range(0, whole, length))
            del rest[:whole]


def held_out_prompts(
    tokenizer, sources: Sequence[str], length: int, count: int, everything: bool = False
) -> list[tuple[str, list[int]]]:
    """(source, ids) of `count` prompts of `length` tokens from held-out documents, or from any with `everything`.

    The prompts end at places that depend on `count` only: prompts of several lengths end at the same tokens.
    """
    found: list[tuple[str, list[int]]] = []
    for source in sources:
        name = Path(source).stem
        ids = [encode(tokenizer, d.text) for d in documents(source) if d.held_out or everything]
        ids = [i for i in ids if len(i) > length]
        if not ids:
            continue
        here = count // len(sources) + (len(found) < count % len(sources))
        for n in range(here):
            text = ids[n % len(ids)]
            nth, of = n // len(ids), -(-here // len(ids))
            end = int(len(text) * (nth + 1) / (of + 1))
            if end >= length:
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
