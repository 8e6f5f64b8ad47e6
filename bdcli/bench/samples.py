"""Prompts to measure on, as token ids: every context of a sample ends at the same token.

A document is cut at interior anchors, so that what would follow the prompt is text too. A row with a question
(LongBench) or a data set with an instruction ends with that, and the document gives what stands before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bdcli.errors import UserError
from bdcli.prompts import encode, stdlib_text
from bdcli.train.data import documents

LONGBENCH = "longbench/"
INSTRUCTIONS = {"lwm": "\n\nSummary of the text above:"}  # after the document, as the paper's LWM set asks for


@dataclass(frozen=True)
class Sample:
    """Prompt number `index` of a data set: the last tokens of `before`, then `tail` (empty for running text)."""

    dataset: str
    index: int
    source: str
    start: tuple[int, ...]  # what the tokenizer puts in front of any text
    before: tuple[int, ...]
    tail: tuple[int, ...]

    def prompt(self, context: int) -> list[int]:
        """Exactly `context` ids."""
        room = context - len(self.start) - len(self.tail)
        return [*self.start, *self.before[len(self.before) - room :], *self.tail]


def ids_digest(ids: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()


def load_samples(tokenizer, dataset: str, sources: Sequence[str], count: int, longest: int) -> list[Sample]:
    """`count` samples of up to `longest` tokens; fewer when the documents are rows with a question each.

    Documents too short are passed over. Raises UserError when none is long enough.
    """
    start = tuple(encode(tokenizer, ""))
    usable, short = [], 0
    for name, text, question in _rows(dataset, sources):
        ids, tail = _bare(tokenizer, text, start), _bare(tokenizer, question, start) if question else ()
        fits = len(start) + len(tail) < longest <= len(start) + len(ids) + len(tail)
        short += not fits
        if fits:
            usable.append((name, ids, tail))
        if len(usable) == count:
            break
    if not usable:
        raise UserError(
            f"no document of {dataset} ({', '.join(sources)}) has {longest} tokens; {short} are shorter",
            "Lower --ctx or name longer texts",
        )
    samples = []
    for n in range(count):
        (name, ids, tail), turn = usable[n % len(usable)], n // len(usable)
        if tail and turn:
            break  # a question is asked once
        of = (count - n % len(usable) + len(usable) - 1) // len(usable)  # samples cut from this document
        least = longest - len(start) - len(tail)
        end = len(ids) if tail else least + (len(ids) - least) * (turn + 1) // (of + 1)
        samples.append(Sample(dataset, n, f"{name}@{end}", start, ids[end - least : end], tail))
    return samples


def _bare(tokenizer, text: str, start: tuple[int, ...]) -> tuple[int, ...]:
    """Ids of `text` without what the tokenizer puts in front."""
    ids = tuple(encode(tokenizer, text))
    return ids[len(start) :] if start and ids[: len(start)] == start else ids


def _rows(dataset: str, sources: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(name, document, question or "") of every document."""
    instruction = INSTRUCTIONS.get(dataset, "")
    for source in sources:
        path = Path(source).expanduser()
        if source == "stdlib":
            rows = iter([("held out", stdlib_text(), "")])
        elif path.suffix == ".jsonl" and path.is_file():
            rows = _json_rows(path.stem, path.read_text("utf-8"), str(path))
        elif source.startswith(LONGBENCH) and not path.exists():
            rows = _json_rows(source, _longbench(source.removeprefix(LONGBENCH)), source)
        else:
            rows = ((d.name, d.text, "") for d in documents(source))
        for name, text, question in rows:
            yield name, text, question or instruction


def _json_rows(name: str, text: str, where: str) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}:{number} is not JSON ({error.msg})", "Mend or remove the line") from None
        document = next((row[f] for f in ("context", "text", "document_text", "content") if row.get(f)), None)
        if document is None:
            raise UserError(f"{where}:{number} has no field context, text, document_text or content", "Name it `text`")
        question = f"\n\n{row['input']}" if row.get("input") and row.get("context") else ""
        yield f"{name}:{number}", document, question


def _longbench(task: str) -> str:
    """A LongBench task as JSON lines, straight from the data.zip on the hub; no data-set script is run."""
    import zipfile

    from huggingface_hub import hf_hub_download

    try:
        archive = hf_hub_download("THUDM/LongBench", "data.zip", repo_type="dataset")
        return zipfile.ZipFile(archive).read(f"data/{task}.jsonl").decode("utf-8")
    except KeyError:
        raise UserError(
            f"LongBench has no task {task}", "See https://huggingface.co/datasets/THUDM/LongBench"
        ) from None
    except Exception as error:  # the hub raises many kinds, those of its HTTP library among them
        hint = "Where there is a network: hf download --repo-type dataset THUDM/LongBench data.zip; "
        raise UserError(
            f"{LONGBENCH}{task} is not here and the hub did not answer ({type(error).__name__})",
            hint + f"then unzip it and give --datasets {LONGBENCH}{task}=FILE.jsonl",
        ) from None
