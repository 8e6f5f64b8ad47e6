"""Tokenizers of models, and whether a target and a drafter share their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bdcli.base.errors import UserError
from bdcli.model.source import open_source


def load_tokenizer(path: Path):
    """The tokenizer of a model, of the kind that `transformers` builds; no remote code.

    Its `embedding_rows` is the vocabulary size that the model has, None where there is no model.
    """
    return open_source(path).tokenizer()


def check_ids(tokenizer, ids: Sequence[int]) -> None:
    """Raise UserError, naming the token, where the tokenizer made an id that the model's embedding has no row for."""
    rows = getattr(tokenizer, "embedding_rows", None)
    if rows is None or not ids or max(ids) < rows:
        return
    first = next(token for token in ids if token >= rows)
    raise UserError(
        f"token {tokenizer.convert_ids_to_tokens(first)!r} has id {first}, the model's embedding has {rows} rows",
        "Take it out of the text, or use a model whose embedding was resized for its tokenizer",
    )


def added_ids(tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer puts in front of any text, and what it appends."""
    nothing, letter = (tuple(tokenizer(text, verbose=False)["input_ids"]) for text in ("", "x"))
    front = _common_start(nothing, letter)
    back = _common_start(nothing[len(front) :][::-1], letter[len(front) :][::-1])
    return front, back[::-1]


def _common_start(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    same = next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return a[:same]


def check_vocabulary(target: Path, drafter: Path, target_tokenizer) -> None:
    """Raise UserError unless every id that both know means the same token."""
    if target == drafter:
        return
    files = [folder / "tokenizer.json" for folder in (target, drafter)]
    if all(file.exists() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return
    ours = {i: token for token, i in target_tokenizer.get_vocab().items()}
    theirs = {i: token for token, i in load_tokenizer(drafter).get_vocab().items()}
    other = [i for i in ours.keys() & theirs.keys() if ours[i] != theirs[i]]
    if other or abs(len(ours) - len(theirs)) > 0.01 * len(ours):
        first = min(other, default=None)
        detail = (
            f"id {first} is {theirs[first]!r}, not {ours[first]!r}"
            if other
            else f"{len(theirs)} tokens, not {len(ours)}"
        )
        raise UserError(
            f"drafter {drafter} has another vocabulary than target {target} ({detail})",
            "Use a drafter distilled for this target",
        )
