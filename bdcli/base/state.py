"""State of training on disk: tensors and plain values under a key of everything they depend on."""

from __future__ import annotations

from pathlib import Path

import torch

from bdcli.base.errors import UserError
from bdcli.base.files import write_file


def write_state(path: Path, key: str, state: dict) -> None:
    """Save tensors and plain values under `key`, atomically."""
    write_file(path, lambda file: torch.save({"key": key} | state, file))


def read_state(path: Path, key: str) -> dict:
    """What `write_state` saved. Raises UserError on a damaged file or one of another key; nothing is overwritten."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["key"]
    except Exception as error:  # pickle, zip and torch each raise their own
        kind = type(error).__name__
        raise UserError(f"{path} is damaged ({kind})", "Restore it, or remove it to make it again") from None
    if found != key:
        raise UserError(
            f"{path} belongs to another recipe, data set or model", "Use the recipe it was made by, or another --out"
        )
    return state
