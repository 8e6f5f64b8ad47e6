"""Tokenizers of models, and whether a target and a drafter share their tokens."""

from __future__ import annotations

from pathlib import Path

from bdcli.base.errors import UserError
from bdcli.model.source import open_source


def load_tokenizer(path: Path):
    """The tokenizer of a model, of the kind that `transformers` builds; no remote code."""
    return open_source(path).tokenizer()


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
