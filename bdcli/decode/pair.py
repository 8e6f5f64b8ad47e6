"""A target and a drafter, found, checked and loaded once, with the backend that runs them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from bdcli.backends.select import Backend, pick_backend
from bdcli.base.devices import dtype_name, free_memory, pick_device, pick_dtype
from bdcli.base.errors import UserError
from bdcli.base.files import user_path
from bdcli.base.progress import SILENT, Progress
from bdcli.config.decode import DecodeOptions
from bdcli.model.checkpoint import eos_tokens, load_model, read_config
from bdcli.model.config import ModelConfig
from bdcli.model.hub import resolve
from bdcli.model.llama import Model
from bdcli.model.sizes import gigabytes, weight_bytes
from bdcli.model.tokenizer import check_vocabulary, load_tokenizer


@dataclass(frozen=True)
class FoundPair:
    """A target and drafter that are here and fit together; nothing of their weights is loaded."""

    folders: tuple[Path, Path]
    configs: tuple[ModelConfig, ModelConfig]
    tokenizer: object
    eos: frozenset[int]
    names: tuple[str, str]
    device: torch.device
    dtype: torch.dtype

    def load(self, engine: str, progress: Progress = SILENT) -> Pair:
        """Load both models and pick what runs them. Raises UserError on every fault of a folder.

        What the user may have to wait for is a note of `progress`.
        """
        models = [load_model(folder, self.dtype, self.device) for folder in self.folders]
        return Pair(*models, self.tokenizer, self.eos, self.names, pick_backend(engine, models, progress))

    def check_weights(self) -> None:
        """Raises UserError where the weights alone do not fit into memory."""
        needed = sum(weight_bytes(config, dtype_name(self.dtype)) for config in self.configs)
        free = free_memory(self.device)
        if needed > free:
            raise UserError(
                f"the weights take {gigabytes(needed)}, but {gigabytes(free)} are free on {self.device}",
                "Use smaller models or free memory on the device",
            )


@dataclass(frozen=True)
class Pair:
    """A loaded target and drafter with the target's tokenizer."""

    target: Model
    drafter: Model
    tokenizer: object
    eos: frozenset[int]
    names: tuple[str, str]
    backend: Backend

    @property
    def configs(self) -> tuple[ModelConfig, ModelConfig]:
        return self.target.config, self.drafter.config

    @property
    def device(self) -> torch.device:
        return self.target.device

    @property
    def dtype(self) -> torch.dtype:
        return self.target.dtype


def find_pair(options: DecodeOptions) -> FoundPair:
    """Find and check both models. Every fault that shows without loading them is a UserError."""
    folders = resolve(options.target, "target"), resolve(options.drafter, "drafter")
    device = pick_device(options.device)
    tokenizer = load_tokenizer(folders[0])
    check_vocabulary(*folders, tokenizer)
    return FoundPair(
        folders=folders,
        configs=tuple(map(read_config, folders)),
        tokenizer=tokenizer,
        eos=eos_tokens(folders[0]),
        names=tuple(map(_name, (options.target, options.drafter), folders)),
        device=device,
        dtype=pick_dtype(options.dtype, device),
    )


def load_pair(options: DecodeOptions, progress: Progress = SILENT) -> Pair:
    """Find, check and load both models. Raises UserError as `find_pair` and `FoundPair.load` do."""
    found = find_pair(options)
    found.check_weights()
    return found.load(options.engine, progress)


def _name(given: str, folder: Path) -> str:
    """How a model is stored: a local folder by its whole path."""
    return str(folder.resolve()) if user_path(given).is_dir() else given
