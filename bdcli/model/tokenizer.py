"""Tokenizers of model folders, and whether a target and a drafter share their tokens."""

from __future__ import annotations

from pathlib import Path

from bdcli.base.errors import UserError
from bdcli.model.hub import read_model_json

_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")  # tokenizer_class of a tokenizer.json that says it all


def load_tokenizer(folder: Path):
    """The folder's tokenizer as `transformers` builds it; no remote code."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{folder} holds no tokenizer", "Copy tokenizer.json and tokenizer_config.json into it")
    settings = read_model_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    if settings.get("tokenizer_class") in _GENERIC and (folder / "tokenizer.json").exists():
        # what AutoTokenizer would choose, without its 150 MB of other models' modules
        from transformers import PreTrainedTokenizerFast as AutoTokenizer
    else:
        from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds for a broken file
        raise UserError(f"{folder}: the tokenizer cannot be read ({error})", "Download it again") from None


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
