"""A model in a Hugging Face folder: config.json, safetensors, tokenizer files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from bdcli.base.errors import UserError
from bdcli.base.files import digest

_IGNORED = ("rotary_emb.inv_freq",)  # tables that old checkpoints carry
_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")  # tokenizer_class of a tokenizer.json that says it all
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json")
COPIED = (".json", ".model", ".jinja")  # what a model folder holds besides its weights


class Folder:
    """See `bdcli.model.source.Source`."""

    def __init__(self, path: Path):
        self.path = path

    def config(self) -> dict:
        return read_model_json(self.path / "config.json")

    def eos(self) -> frozenset[int]:
        """EOS ids: generation_config.json first, as `transformers` has it, else config.json."""
        for name in ("generation_config.json", "config.json"):
            path = self.path / name
            eos = read_model_json(path).get("eos_token_id") if path.exists() else None
            if eos is not None:
                return frozenset(eos if isinstance(eos, list) else [eos])
        return frozenset()

    def weights(self, dtype: torch.dtype, device: torch.device, keep_codes: bool) -> SafetensorsWeights:  # noqa: ARG002
        return SafetensorsWeights(self.path, dtype, device)

    def tokenizer(self):
        if not any((self.path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise UserError(f"{self.path} holds no tokenizer", "Copy tokenizer.json and tokenizer_config.json into it")
        path = self.path / "tokenizer_config.json"
        settings = read_model_json(path) if path.exists() else {}
        if settings.get("tokenizer_class") in _GENERIC and (self.path / "tokenizer.json").exists():
            # what AutoTokenizer would choose, without its 150 MB of other models' modules
            from transformers import PreTrainedTokenizerFast as AutoTokenizer
        else:
            from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the library raises many kinds for a broken file
            raise UserError(f"{self.path}: the tokenizer cannot be read ({error})", "Download it again") from None

    def fingerprint(self) -> str:
        parts = [(self.path / "config.json").read_bytes()]
        for path in sorted(self.path.glob("*.safetensors")):
            parts += [f"{path.name} {path.stat().st_size}".encode(), *ends_of(path)]
        return digest(b"".join(parts))

    def write_tokenizer(self, folder: Path) -> None:
        for name in _TOKENIZER_FILES:
            if (self.path / name).exists():
                shutil.copy(self.path / name, folder)

    def write_files(self, folder: Path) -> None:
        for path in self.path.iterdir():
            if path.suffix in COPIED and not path.name.endswith(".index.json"):
                shutil.copy(path, folder)


class SafetensorsWeights:
    """Tensors of safetensors files; see `bdcli.model.source.Weights`."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device):
        from safetensors import SafetensorError, safe_open

        self._folder, self.dtype, self._device = folder, dtype, device
        self._corrupt = SafetensorError
        index = folder / "model.safetensors.index.json"
        if index.exists():
            shards = read_model_json(index).get("weight_map")
            if not shards:
                raise UserError(f"{index} lists no weights", "Download it again")
            files = sorted(set(shards.values()))
        elif (folder / "model.safetensors").exists():
            files = ["model.safetensors"]
        elif list(folder.glob("*.bin")):
            hint = f"Make safetensors of them: bdcli convert {folder} NEW_FOLDER"
            raise UserError(f"{folder} has only .bin weights, which can run code when loaded", hint)
        else:
            hint = "Point at a Hugging Face model folder; of .bin weights on the hub bdcli convert makes one"
            raise UserError(f"{folder} holds no model.safetensors", hint)
        self._where = {}
        for name in files:
            path = folder / name
            if not path.exists():
                raise UserError(f"{path} is missing", "Download the model folder again")
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise _damaged(path, error) from None
            self._where.update(dict.fromkeys(handle.keys(), (path, handle)))
        self._open = set(self._where)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._where:
            raise UserError(f"{self._folder}: tensor {name} is missing", "Check config.json against the checkpoint")
        self._open.discard(name)
        path, handle = self._where[name]
        try:
            tensor = handle.get_tensor(name)
        except (self._corrupt, OSError) as error:
            raise _damaged(path, error) from None
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, config.json says {shape}", "Check the pair"
            )
        return tensor.to(self._device, self.dtype)

    def skip(self, name: str) -> None:
        self._open.discard(name)

    def expect_empty(self) -> None:
        left = sorted(n for n in self._open if not n.endswith(_IGNORED))
        if left:
            raise UserError(f"{self._folder}: {len(left)} tensors have no place in this model, first {left[0]}")


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged or truncated ({error})", "Download it again")


def ends_of(path: Path) -> list[bytes]:
    """The first and last MiB of a file."""
    with path.open("rb") as file:
        first = file.read(2**20)
        file.seek(max(0, path.stat().st_size - 2**20))
        return [first, file.read()]


def read_model_json(path: Path) -> dict:
    """A JSON object of a model folder. Raises UserError where it is missing or damaged."""
    try:
        parsed = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", "Point at a Hugging Face model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error})", "Download it again") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{path} is not a JSON object", "Download it again")
    return parsed
