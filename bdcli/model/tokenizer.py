"""Tokenizers of model folders, and whether a target and a drafter share their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bdcli.base.errors import UserError
from bdcli.model.hub import read_model_json

_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")  # tokenizer_class of a tokenizer.json that says it all


def load_tokenizer(folder: Path):
    """The folder's tokenizer as `transformers` builds it; no remote code.

    Its `embedding_rows` is the vocabulary size that the folder's model has, None where there is no model.
    """
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{folder} holds no tokenizer", "Copy tokenizer.json and tokenizer_config.json into it")
    settings = read_model_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    if settings.get("tokenizer_class") in _GENERIC and (folder / "tokenizer.json").exists():
        # what AutoTokenizer would choose, without its 150 MB of other models' modules
        from transformers import PreTrainedTokenizerFast as AutoTokenizer
    else:
        from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds for a broken file
        raise UserError(f"{folder}: the tokenizer cannot be read ({error})", "Download it again") from None
    config = folder / "config.json"
    tokenizer.embedding_rows = read_model_json(config).get("vocab_size") if config.exists() else None
    return tokenizer


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
