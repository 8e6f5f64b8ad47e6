"""What a model is read from, a Hugging Face folder or a GGUF file, behind one interface."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from bdcli.model.folder import Folder
from bdcli.model.gguf import Gguf
from bdcli.model.gguf_file import SUFFIX
from bdcli.model.quantised import Weight


class Weights(Protocol):
    """Tensors of a checkpoint by their Hugging Face names, each taken once."""

    dtype: torch.dtype  # of what is taken, unless it is in codes

    def take(self, name: str, shape: tuple[int, ...]) -> Weight:
        """A tensor of that shape, or a UserError that names it."""

    def skip(self, name: str) -> None:
        """Leave a tensor out, if there is one."""

    def expect_empty(self) -> None:
        """Raise UserError where a tensor was neither taken nor skipped."""


class Source(Protocol):
    """The files of a model."""

    def config(self) -> dict:
        """The parsed config.json, or what it would be."""

    def eos(self) -> frozenset[int]:
        """Ids that end a text."""

    def weights(self, dtype: torch.dtype, device: torch.device, keep_codes: bool) -> Weights:
        """Weights to take, cast to `dtype` on `device`, or in the codes that the files have."""

    def tokenizer(self):
        """The tokenizer as `transformers` has it."""

    def fingerprint(self) -> str:
        """A digest that changes when the model does."""

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files of a Hugging Face folder."""

    def write_files(self, folder: Path) -> None:
        """Write all files of a Hugging Face folder but the weights."""


def open_source(path: Path) -> Source:
    """The model at `path`, as `resolve` returns it."""
    return Gguf(path) if path.suffix == SUFFIX and not path.is_dir() else Folder(path)
