"""Texts whose later parts only memory of earlier ones predicts: training data for using a long context.

A document states things with made-up names and numbers, and repeats them later at distances drawn log-uniformly, so
near and far copies are equally common. Nothing else predicts a repetition.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

DOCUMENTS = 400
SHORTEST_COPY_TOKENS = 24
REPEATED_TOKENS = 512  # shorter sequences are repeated until there are so many
DOCUMENT_CHARACTERS = 48_000  # about 16K tokens of a 4,096-entry vocabulary
_SYLLABLES = [a + b for a in "bdfghklmnrstvz" for b in "aeo"]
_PLACES = ("the mill", "the harbour", "the old church", "the library", "the north tower", "the garden", "the inn")
_THINGS = ("lamp", "key", "letter", "coat", "sword", "book", "ring", "clock", "cup", "map", "rope", "flute", "seal")
_COLOURS = ("red", "blue", "green", "white", "black", "brown", "grey", "yellow", "golden", "silver")


def recall_documents(count: int = DOCUMENTS, characters: int = DOCUMENT_CHARACTERS) -> Iterator[tuple[str, str]]:
    """(name, text) of `count` documents, always the same ones."""
    for number in range(count):
        yield f"recall:{number}", _document(random.Random(f"recall {number}"), characters)


def copied_ids(rng: random.Random, vocabulary: Sequence[int], size: int, longest: int) -> list[int]:
    """`size` ids: random sequences of log-uniform lengths up to `longest`, each at least twice in a row.

    Nothing but finding the last occurrence and copying what followed helps, so heads that do it (induction heads,
    Olsson et al. 2022) form within a million tokens, where text alone takes a small model far more.
    """
    found: list[int] = []
    while len(found) < size:
        length = int(math.exp(rng.uniform(math.log(min(SHORTEST_COPY_TOKENS, longest)), math.log(longest))))
        found += rng.choices(vocabulary, k=length) * max(2, REPEATED_TOKENS // length)
    return found[:size]


def _document(rng: random.Random, characters: int) -> str:
    make, statements = rng.choice((_fact, _passage, _assignment)), []
    parts, size = [], 0
    while size < characters:
        if not statements or rng.random() < 0.45:
            statements.append(make(rng))
            part = statements[-1]
        else:  # how far back: log-uniform over all statements
            back = math.exp(rng.uniform(0, math.log(len(statements) + 0.5)))
            part = statements[len(statements) - min(len(statements), int(back))]
        parts.append(part)
        size += len(part)
    return "".join(parts)


def _name(rng: random.Random) -> str:
    return "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 4))).capitalize()


def _fact(rng: random.Random) -> str:
    thing = f"{rng.choice(_COLOURS)} {rng.choice(_THINGS)}"
    owner, number = f"{_name(rng)} {_name(rng)}", rng.randint(100, 99999)
    return f"The {thing} of {owner} lies in {rng.choice(_PLACES)}, under number {number}.\n"


def _passage(rng: random.Random) -> str:
    words = [
        rng.choice(_THINGS + _COLOURS) if rng.random() < 0.5 else _name(rng).lower() for _ in range(rng.randint(8, 40))
    ]
    return " ".join(words).capitalize() + ".\n\n"


def _assignment(rng: random.Random) -> str:
    name = "_".join(_name(rng).lower() for _ in range(rng.randint(1, 2)))
    value = rng.choice((str(rng.randint(0, 99999)), repr(_name(rng)), f"[{rng.randint(0, 99)}, {rng.randint(0, 99)}]"))
    return f"config[{name!r}] = {value}\n"
