"""What a model is read from, a Hugging Face folder or a GGUF file, behind one interface."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

import torch

from bdcli.base.digests import file_digest
from bdcli.base.errors import UserError
from bdcli.base.files import digest
from bdcli.model.gguf.file import SUFFIX
from bdcli.model.gguf.model import Gguf
from bdcli.model.hub import read_model_json
from bdcli.model.quantised import Weight
from bdcli.model.safetensors_files import TensorFiles, refuse_adapter

COPIED = (".json", ".model", ".jinja")  # what a model folder holds besides its weights
_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")  # tokenizer_class of a tokenizer.json that says it all
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json")
_IDENTITY = (  # what a model is, beside its weights
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "model.safetensors.index.json",
)


class Weights(Protocol):
    """Tensors of a checkpoint by their Hugging Face names, each taken once."""

    dtype: torch.dtype  # of what is taken, unless it is in codes

    def take(self, name: str, shape: tuple[int, ...]) -> Weight:
        """A tensor of that shape, or a UserError that names it."""

    def __contains__(self, name: str) -> bool: ...

    def expect_empty(self) -> None:
        """Raise UserError where a tensor was not taken."""


class Source(Protocol):
    """The files of a model."""

    def config(self) -> dict:
        """The parsed config.json, or what it would be."""

    def eos(self) -> frozenset[int]:
        """Ids that end a text."""

    def weights(self, dtype: torch.dtype, device: torch.device, keep_codes: bool) -> Weights:
        """Weights to take, cast to `dtype` on `device`, or in the codes that the files have."""

    def codes(self, number_bytes: int) -> tuple[int, int] | None:
        """(bytes of the weights in memory, bits of a layer's codes) when codes are kept and all other numbers take
        `number_bytes`; None where the layers are plain numbers.
        """

    def tokenizer(self):
        """The tokenizer as `transformers` has it."""

    def fingerprint(self) -> str:
        """Identity of the model: of its weights, its configuration, its tokenizer and its EOS tokens."""

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files of a Hugging Face folder."""

    def write_files(self, folder: Path) -> None:
        """Write all files of a Hugging Face folder but the weights."""


class Folder:
    """A Hugging Face folder: config.json, safetensors, tokenizer files."""

    def __init__(self, path: Path):
        self.path = path

    def config(self) -> dict:
        refuse_adapter(self.path)
        return read_model_json(self.path / "config.json")

    def eos(self) -> frozenset[int]:
        """EOS ids: generation_config.json first, as `transformers` has it, else config.json."""
        for name in ("generation_config.json", "config.json"):
            path = self.path / name
            eos = read_model_json(path).get("eos_token_id") if path.exists() else None
            if eos is not None:
                found = eos if isinstance(eos, list) else [eos]
                if not all(type(token) is int for token in found):
                    raise UserError(
                        f"{path} has eos_token_id = {eos!r}, not a token id or a list of them", "Correct it"
                    )
                return frozenset(found)
        return frozenset()

    def weights(self, dtype: torch.dtype, device: torch.device, keep_codes: bool) -> TensorFiles:  # noqa: ARG002
        return TensorFiles(self.path, dtype, device)

    def codes(self, number_bytes: int) -> None:  # noqa: ARG002
        return None

    def tokenizer(self):
        folder = self.path
        if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise UserError(f"{folder} holds no tokenizer", "Copy tokenizer.json and tokenizer_config.json into it")
        named = folder / "tokenizer_config.json"
        settings = read_model_json(named) if named.exists() else {}
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

    def fingerprint(self) -> str:
        names = [path.name for path in self.path.glob("*.safetensors")]
        names += [name for name in _IDENTITY if (self.path / name).exists()]
        return digest([(name, file_digest(self.path / name)) for name in sorted(names)])

    def write_tokenizer(self, folder: Path) -> None:
        for name in _TOKENIZER_FILES:
            if (self.path / name).exists():
                shutil.copy(self.path / name, folder)

    def write_files(self, folder: Path) -> None:
        for path in self.path.iterdir():
            if path.suffix in COPIED and not path.name.endswith(".index.json"):
                shutil.copy(path, folder)


def open_source(path: Path) -> Source:
    """The model at `path`, as `resolve` returns it."""
    return Gguf(path) if path.suffix == SUFFIX and not path.is_dir() else Folder(path)
