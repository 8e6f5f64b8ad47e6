"""A target and a drafter, found, checked and loaded once, with the backend that runs them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bdcli.backends.select import Backend, pick_backend
from bdcli.base.devices import free_memory, pick_device, pick_dtype
from bdcli.base.errors import UserError
from bdcli.base.progress import SILENT, Progress
from bdcli.config.decode import DecodeOptions
from bdcli.model.checkpoint import eos_tokens, load_model, read_config
from bdcli.model.hub import resolve
from bdcli.model.llama import Model
from bdcli.model.sizes import gigabytes, weight_count
from bdcli.model.tokenizer import check_vocabulary, load_tokenizer


@dataclass(frozen=True)
class Pair:
    """A loaded target and drafter with the target's tokenizer."""

    target: Model
    drafter: Model
    tokenizer: object
    eos: frozenset[int]
    names: tuple[str, str]
    backend: Backend


def load_pair(options: DecodeOptions, progress: Progress = SILENT) -> Pair:
    """Find, check and load both models and pick what runs them. Every fault of a folder is a UserError.

    What the user may have to wait for is a note of `progress`.
    """
    folders = resolve(options.target, "target"), resolve(options.drafter, "drafter")
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    tokenizer = load_tokenizer(folders[0])
    check_vocabulary(*folders, tokenizer)
    if device.type == "cuda":
        needed = sum(weight_count(read_config(folder)) for folder in folders) * dtype.itemsize
        free = free_memory(device)
        if needed > free:
            raise UserError(
                f"the weights take {gigabytes(needed)}, but {gigabytes(free)} are free on {device}",
                "Use smaller models or free memory on the device",
            )
    models = [load_model(folder, dtype, device) for folder in folders]
    names = tuple(map(_name, (options.target, options.drafter), folders))
    return Pair(*models, tokenizer, eos_tokens(folders[0]), names, pick_backend(options.engine, models, progress))


def _name(given: str, folder: Path) -> str:
    """How a model is stored: a local folder by its whole path."""
    return str(folder.resolve()) if Path(given).expanduser().is_dir() else given
