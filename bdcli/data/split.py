"""The two sides of the split: training windows, and prompts and windows of held-out documents, all as token ids."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bdcli.base.errors import UserError
from bdcli.base.progress import SILENT, Progress
from bdcli.data.document import Document, Unread
from bdcli.data.prompts import encode_document
from bdcli.data.sources import documents, missing_sources, split_source

_LOOKED_THROUGH = 400  # documents; one in twelve or so is held out


@dataclass(frozen=True)
class Candidate:
    """A training window to be. `question`: the ids end with one, and the target is to write what follows."""

    ids: list[int]
    question: bool = False


class TrainingDocuments:
    """Training documents of several sources.

    accounts: (read, kept, dropped by reason, failed), which add up. unread: what failed, and files passed over.
    """

    def __init__(self, sources: Sequence[str], enough: float = math.inf):
        self.unread = Unread()
        found = [d for source in sources for d in documents(source, self.unread, enough)]
        self._kept = [d for d in found if d.text and not d.held_out]
        dropped = {"held out": sum(d.held_out for d in found), "empty": sum(not (d.text or d.held_out) for d in found)}
        failed = self.unread.failed
        self.accounts = len(found) + failed, len(self._kept), dropped, failed

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
            ids = encode_document(tokenizer, document.text + document.question)
            if answer:
                before = (before + ids)[answer - length :]
                if document.question and len(before) == length - answer:
                    yield Candidate(before, question=True)
                before = before + end
            rest += ids + end
            whole = len(rest) // length * length
            yield from (Candidate(rest[at : at + length]) for at in range(0, whole, length))
            del rest[:whole]


def held_out_prompts(
    tokenizer, sources: Sequence[str], length: int, count: int, everything: bool = False, progress: Progress = SILENT
) -> list[tuple[str, list[int]]]:
    """(data set, ids) of `count` prompts of `length` tokens from held-out documents, or from any with `everything`.

    The prompts end at places that depend on `count` only, those of a document with a question at its end, once:
    prompts of several lengths end at the same tokens. Raises UserError where no document is long enough.
    """
    found: list[tuple[str, list[int]]] = []
    draw = _Draw(sources, everything, "evaluation", progress)
    for source in sources:
        name, here = split_source(source)[0], count // len(sources) + (len(found) < count % len(sources))
        usable: list[tuple[list[int], bool]] = []
        for d in draw.documents(source) if here else ():
            ids = encode_document(tokenizer, d.text + d.question)
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
        raise draw.error(length)
    draw.note()
    return found


def held_out_windows(
    tokenizer, sources: Sequence[str], length: int, count: int, everything: bool, progress: Progress = SILENT
) -> list[list[int]]:
    """Up to `count` windows of `length` ids from the middles of documents, in turn from each source.

    `everything` takes any document (a source kept for measuring), else only held-out ones. Raises UserError where no
    document is long enough.
    """
    pools = []
    draw = _Draw(sources, everything, "held_out", progress)
    for source in sources:
        pool = []
        for doc in draw.documents(source):
            ids = encode_document(tokenizer, doc.text)
            if len(ids) >= length:
                start = (len(ids) - length) // 2
                pool.append(ids[start : start + length])
            if len(pool) == count:
                break
        pools.append(pool)
    found = [window for row in itertools.zip_longest(*pools) for window in row if window is not None]
    if not found:
        raise draw.error(length)
    draw.note()
    return found[:count]


class _Draw:
    """Documents to measure on: held-out ones, or all with `everything`. `section` of the recipe says which."""

    def __init__(self, sources: Sequence[str], everything: bool, section: str, progress: Progress):
        self._sources, self._everything, self._section, self._progress = sources, everything, section, progress
        self._unread = Unread()
        self._read = dict.fromkeys(sources, 0)
        self._drawn = dict.fromkeys(sources, 0)

    def documents(self, source: str) -> Iterator[Document]:
        for document in documents(source, self._unread):
            self._read[source] += 1
            if document.held_out or self._everything:
                self._drawn[source] += 1
                yield document

    def note(self) -> None:
        """Show what could not be read, and sources that are not measured."""
        if self._everything:  # else they are the training sources, which are reported where they are read whole
            self._unread.note(self._progress)
        for source, read in self._read.items():
            if read and not self._drawn[source]:
                self._progress.note(not_drawn(read, [source]))

    def error(self, length: int) -> UserError:
        """That no document will do."""
        names, read, drawn = ", ".join(self._sources), sum(self._read.values()), sum(self._drawn.values())
        if not drawn:
            return UserError(not_drawn(read, self._sources), f"Name texts to measure on in {self._section}.sources")
        which = "" if self._everything else "held-out "
        return UserError(
            f"no {which}document of {names} has {length} tokens ({drawn} shorter)",
            f"Lower {self._section}.contexts, or name longer texts in {self._section}.sources",
        )


def not_drawn(count: int, sources: Sequence[str]) -> str:
    """That documents give no text to measure on."""
    return f"none of the {count} documents of {', '.join(sources)} was drawn for measuring"


def missing_held_out(sources: Sequence[str]) -> Iterator[str]:
    """That no document of readable sources was drawn for measuring, as far as that shows after a few hundred."""
    count = 0
    for source in sources:
        for document in documents(source):
            count += 1
            if document.held_out or count == _LOOKED_THROUGH:
                return
    yield not_drawn(count, sources)


def missing_texts(
    section: str, sources: Sequence[str], measuring: str, measured: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """(key, message) of texts that are not here, or of which none is for measuring, by sections of a recipe."""
    missing = [(f"{section}.sources", problem) for problem in missing_sources(sources)]
    yield from missing
    if measured:
        yield from ((f"{measuring}.sources", problem) for problem in missing_sources(measured))
    elif not missing:
        yield from ((f"{measuring}.sources", problem) for problem in missing_held_out(sources))
