"""The tensors of a model folder by name, and what a folder is that holds another kind of weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bdcli.base.errors import UserError
from bdcli.model.config import eagle_head, quantised
from bdcli.model.hub import read_model_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ADAPTER = "adapter_config.json"
_BASE = "model."  # names of a base model lack it
_IGNORED = ("rotary_emb.inv_freq",)  # tables that old checkpoints carry
_PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_EAGLE = ("fc.weight", "d2t", "t2d", "midlayer.")
_PACKED = {  # ends of names that only quantised weights have
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_scale": "fp8 or int8 with scales",
    ".weight_scale_inv": "fp8 with scales",
    ".weight_packed": "compressed-tensors",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".scales": "MLX",
}


def refuse_adapter(folder: Path) -> None:
    """Raise UserError where `folder` holds an adapter: alone it is no model, beside one it would be passed over."""
    if not (folder / ADAPTER).exists():
        return
    base = read_model_json(folder / ADAPTER).get("base_model_name_or_path")
    kind = "a LoRA adapter" + (f" of {base}" if isinstance(base, str) and base else "")
    if not any((folder / name).exists() for name in (WEIGHTS, INDEX)):
        raise UserError(f"{folder} is {kind}, not a model", "Merge it into its base model (peft: merge_and_unload)")
    raise UserError(
        f"{folder} holds {kind} beside the model, which is not applied",
        f"Merge it (peft: merge_and_unload), or remove {ADAPTER} to use the model without it",
    )


class TensorFiles:
    """Tensors of a checkpoint by name, each taken once; what nobody took is an error at the end.

    One `model.safetensors` is read where it exists, else the shards of its index, as `transformers` decides. Tensors
    of a base model are found under the names of its class with a head. Raises UserError on files that are missing or
    damaged, and on weights that are no plain numbers.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device):
        from safetensors import SafetensorError, safe_open

        self._folder, self.dtype, self._device = folder, dtype, device
        self._corrupt = SafetensorError
        self._where = {}
        for path in _files(folder):
            if not path.exists():
                raise UserError(f"{path} is missing", "Download the model folder again")
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise _damaged(path, error) from None
            self._where.update({name: (path, handle, name) for name in handle.keys()})  # noqa: SIM118
        _refuse_other_kinds(str(folder), list(self._where))
        if not any(name.startswith(_BASE) for name in self._where):
            self._where = {n if n == HEAD else _BASE + n: place for n, place in self._where.items()}
        self._open = set(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of that name on the device, in the dtype; it has to have that `shape`."""
        if name not in self._where:
            raise self._missing(name)
        self._open.discard(name)
        path, handle, stored = self._where[name]
        try:
            tensor = handle.get_tensor(stored)
        except (self._corrupt, OSError) as error:
            raise _damaged(path, error) from None
        if tensor.dtype not in _PLAIN:
            raise quantised(str(path), f"{stored} is {str(tensor.dtype).removeprefix('torch.')}")
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{path}: {stored} has shape {tuple(tensor.shape)}, config.json says {shape}", "Check the pair"
            )
        return tensor.to(self._device, self.dtype)

    def _missing(self, name: str) -> UserError:
        hint = "Check config.json against the checkpoint"
        if name == HEAD:
            return UserError(
                f"{self._folder}: tensor {name} is missing: a base model without a head does not generate",
                "Use the folder of its causal language model (…ForCausalLM)",
            )
        first = min(self._where, default=None)
        named = f"; the first tensor is {first}" if name == EMBEDDING and first else ""
        return UserError(f"{self._folder}: tensor {name} is missing{named}", hint)

    def expect_empty(self) -> None:
        """Raise UserError where a tensor was not taken."""
        left = sorted(n for n in self._open if not n.endswith(_IGNORED))
        if left:
            raise UserError(f"{self._folder}: {len(left)} tensors have no place in this model, first {left[0]}")


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder."""
    index = folder / INDEX
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if index.exists():
        shards = read_model_json(index).get("weight_map")
        if not shards or not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise UserError(f"{index} lists no weights", "Download it again")
        return [folder / name for name in sorted(set(shards.values()))]
    if list(folder.glob("*.bin")):
        hint = f"Make safetensors of them: bdcli convert {folder} NEW_FOLDER"
        raise UserError(f"{folder} has only .bin weights, which can run code when loaded", hint)
    hint = "Point at a Hugging Face model folder; of .bin weights on the hub bdcli convert makes one"
    raise UserError(f"{folder} holds no {WEIGHTS}", hint)


def _refuse_other_kinds(where: str, names: list[str]) -> None:
    """Raise UserError where names of tensors say that they are no plain weights of a model."""
    if any(name.removeprefix(_BASE).startswith(_EAGLE) for name in names):
        raise eagle_head(where)
    if any(".lora_" in name for name in names):
        raise UserError(f"{where} holds LoRA weights", "Merge them into the model first (peft: merge_and_unload)")
    for end, method in _PACKED.items():
        if any(name.endswith(end) for name in names):
            raise quantised(where, method)


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged or truncated ({error})", "Download it again")
