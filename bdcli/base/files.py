"""Files that appear whole or not at all, and keys that say what a file was made from."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from bdcli.base.errors import BdcliError, UserError


def digest(*parts: object) -> str:
    """Key of anything JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def write_state(path: Path, key: str, state: dict) -> None:
    """Save tensors and plain values under `key`, atomically and on the disk when this returns."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as file:
        torch.save({"key": key} | state, file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


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


def write_text(path: Path, text: str) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, "utf-8")
    fresh.replace(path)


def read_json(path: Path) -> dict:
    """A JSON object that a run wrote. Raises UserError where it is damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path} is damaged", "Restore it, or remove it to make it again") from None


def check_room(folder: Path, needed: int) -> None:
    """Raise BdcliError when the disk of `folder` has not `needed` bytes free."""
    info = os.statvfs(folder)
    free = info.f_bavail * info.f_frsize
    if free < needed:
        raise BdcliError(
            f"{folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed", "Give another --out"
        )
