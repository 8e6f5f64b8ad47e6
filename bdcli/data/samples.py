"""Prompts to measure on, as token ids: every context of a sample ends at the same token.

A document is cut at interior anchors, so that what would follow the prompt is text too. A row with a question
(LongBench) or a data set with an instruction ends with that, and the document gives what stands before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bdcli.base.errors import UserError
from bdcli.base.files import digest
from bdcli.data.prompts import encode
from bdcli.data.sources import INSTRUCTIONS, documents


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
    return digest(list(ids))


def load_samples(
    tokenizer, dataset: str, sources: Sequence[str], count: int, longest: int, asked: bool = True
) -> list[Sample]:
    """`count` samples of up to `longest` tokens; fewer when the documents are rows with a question each.

    Without `asked` questions are left out and all documents are running text.

    Documents too short are passed over. Raises UserError when none is long enough.
    """
    start = tuple(encode(tokenizer, ""))
    usable, short = [], 0
    for name, text, question in _rows(dataset, sources):
        ids, tail = _bare(tokenizer, text, start), _bare(tokenizer, question, start) if question and asked else ()
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
    """(name, document, question or "") of every document; of stdlib what is held out of training."""
    instruction = INSTRUCTIONS.get(dataset, "")
    for source in sources:
        for d in documents(source):
            if d.held_out or source != "stdlib":
                yield d.name, d.text, d.question or instruction
