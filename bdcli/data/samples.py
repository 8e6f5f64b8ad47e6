"""Prompts to measure on, as token ids: every context of a sample ends at the same token.

A document is cut at interior anchors, so that what would follow the prompt is text too. A row with a question
(LongBench) or a data set with an instruction ends with that, and the document gives what stands before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bdcli.base.errors import UserError
from bdcli.base.files import digest
from bdcli.data.document import Unread
from bdcli.data.prompts import encode_document, special_tokens_note
from bdcli.data.sources import INSTRUCTIONS, documents
from bdcli.model.tokenizer import added_ids


@dataclass(frozen=True)
class Sample:
    """Prompt number `index` of a data set: the last tokens of `before`, then `tail` (empty for running text)."""

    dataset: str
    index: int
    source: str
    start: tuple[int, ...]  # what the tokenizer puts in front of any text
    before: tuple[int, ...]
    tail: tuple[int, ...]
    note: str | None = None  # about its document's text, for people

    def prompt(self, context: int) -> list[int]:
        """Exactly `context` ids."""
        first = len(self.before) - (context - len(self.start) - len(self.tail))
        return [*self.start, *self.before[first:], *self.tail]


class _Document(NamedTuple):
    """A document long enough to be cut: its ids, and those of its question."""

    name: str
    ids: tuple[int, ...]
    tail: tuple[int, ...]
    note: str | None


def ids_digest(ids: Sequence[int]) -> str:
    """Digest of a prompt, by which the store recognises it."""
    return digest(list(ids))


def load_samples(
    tokenizer,
    dataset: str,
    sources: Sequence[str],
    count: int,
    longest: int,
    questions: bool = True,
    special: str = "parse",
    unread: Unread | None = None,
) -> list[Sample]:
    """`count` samples of up to `longest` tokens; fewer when the documents are rows with a question each.

    Without `questions` all documents are running text. `special` as for `bdcli.data.prompts.encode`. Documents too
    short are left out; rows and files that cannot be read are counted in `unread`. Raises UserError when none is long
    enough.
    """
    start, rows = added_ids(tokenizer)[0], _rows(dataset, sources, questions, unread)
    usable, short = _usable(_Encoder(tokenizer, start, special), rows, count, longest)
    if not usable:
        raise UserError(
            f"no document of {dataset} ({', '.join(sources)}) has {longest} tokens; {short} are shorter",
            "Lower --ctx or name longer texts",
        )
    samples = []
    for index in range(count):
        (name, ids, tail, note), turn = usable[index % len(usable)], index // len(usable)
        if tail and turn:
            break  # a question is asked once
        length = longest - len(start) - len(tail)
        end = len(ids)
        if not tail:
            cuts = (count - index % len(usable) + len(usable) - 1) // len(usable)  # samples of this document
            end = length + (len(ids) - length) * (turn + 1) // (cuts + 1)
        samples.append(Sample(dataset, index, f"{name}@{end}", start, ids[end - length : end], tail, note))
    return samples


class _Encoder(NamedTuple):
    """A tokenizer, the ids that it puts in front, and how special tokens in a text are read."""

    tokenizer: object
    start: tuple[int, ...]
    special: str

    def __call__(self, text: str) -> tuple[int, ...]:
        """Ids of `text` without those in front."""
        ids = tuple(encode_document(self.tokenizer, text, self.special))
        return ids[len(self.start) :] if self.start and ids[: len(self.start)] == self.start else ids


def _usable(
    encoder: _Encoder, rows: Iterable[tuple[str, str, str]], count: int, longest: int
) -> tuple[list[_Document], int]:
    """The first `count` documents that fill `longest` tokens with their whole question, and how many do not."""
    usable, short = [], 0
    for name, text, question in rows:
        ids = encoder(text)
        tail = encoder(question) if question else ()
        taken = len(encoder.start) + len(tail)
        if taken < longest <= taken + len(ids):
            note = special_tokens_note(encoder.tokenizer, text) if encoder.special == "parse" else None
            usable.append(_Document(name, ids, tail, note))
        else:
            short += 1
        if len(usable) == count:
            break
    return usable, short


def _rows(
    dataset: str, sources: Sequence[str], questions: bool, unread: Unread | None
) -> Iterator[tuple[str, str, str]]:
    """(name, document, question or "") of every document; of stdlib what is held out of training."""
    instruction = INSTRUCTIONS.get(dataset, "")
    for source in sources:
        for d in documents(source, unread):
            if d.held_out or source != "stdlib":
                yield d.name, d.text, (d.question or instruction) if questions else ""
