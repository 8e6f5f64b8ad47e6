"""The two sides of the split: training windows, and prompts and windows of held-out documents, all as token ids."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bdcli.base.errors import UserError
from bdcli.data.prompts import encode_document
from bdcli.data.sources import documents, split_source


@dataclass(frozen=True)
class Candidate:
    """A training window to be. `question`: the ids end with one, and the target is to write what follows."""

    ids: list[int]
    question: bool = False


class TrainingDocuments:
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
    tokenizer, sources: Sequence[str], length: int, count: int, everything: bool = False
) -> list[tuple[str, list[int]]]:
    """(data set, ids) of `count` prompts of `length` tokens from held-out documents, or from any with `everything`.

    The prompts end at places that depend on `count` only, those of a document with a question at its end, once:
    prompts of several lengths end at the same tokens. Raises UserError where no document is long enough.
    """
    found: list[tuple[str, list[int]]] = []
    for source in sources:
        name, here = split_source(source)[0], count // len(sources) + (len(found) < count % len(sources))
        usable: list[tuple[list[int], bool]] = []
        for d in documents(source) if here else ():
            ids = encode_document(tokenizer, d.text + d.question) if d.held_out or everything else []
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


def held_out_windows(tokenizer, sources: Sequence[str], length: int, count: int, everything: bool) -> list[list[int]]:
    """Up to `count` windows of `length` ids from the middles of documents, in turn from each source.

    `everything` takes any document (a source kept for measuring), else only held-out ones. Raises UserError where no
    document is long enough.
    """
    pools = []
    for source in sources:
        pool = []
        for doc in documents(source):
            if doc.held_out or everything:
                ids = encode_document(tokenizer, doc.text)
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
