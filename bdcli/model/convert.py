"""Models in .bin or GGUF files as safetensors folders. A pickle is opened on request only, with `weights_only=True`."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bdcli.base.errors import UserError
from bdcli.base.files import new_folder
from bdcli.model.checkpoint import load_model, read_config, save_model
from bdcli.model.gguf.model import Gguf
from bdcli.model.hub import resolve
from bdcli.model.safetensors_files import EMBEDDING, HEAD
from bdcli.model.source import COPIED, open_source

WEIGHTS, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def convert(name: str, out: Path) -> Path:
    """Write the model `name`, which has .bin weights or is a GGUF file, as the safetensors folder `out`.

    Tensors of .bin files keep their dtype, those of GGUF files become bf16; a head that config.json ties to the
    embedding is left out where it equals that. The folder appears whole or not at all. Raises UserError where there is
    nothing to convert, or a .bin file holds more than tensors.
    """
    if out.exists():
        raise UserError(f"{out} exists", "Give a new folder")
    folder = resolve(name, "target", pickles=True)
    if isinstance(open_source(folder), Gguf):
        save_model(load_model(folder, torch.bfloat16, torch.device("cpu")), folder, out)
        return out
    if list(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds safetensors already", "Use it as it is")
    with new_folder(out) as fresh:
        _convert_into(fresh, folder, spare_head=read_config(folder).tied_head and _head_is_embedding(_files(folder)))
    return out


def _head_is_embedding(files: Sequence[Path]) -> bool:
    """Both tensors are there and hold the same numbers."""
    found: dict[str, Tensor] = {}
    for path in files:
        found |= {name: tensor for name, tensor in _load(path).items() if name in (EMBEDDING, HEAD)}
    return len(found) == 2 and torch.equal(found[EMBEDDING], found[HEAD])


def _convert_into(fresh: Path, folder: Path, spare_head: bool) -> None:
    from safetensors.torch import save_file

    where: dict[str, str] = {}
    files = _files(folder)
    for number, path in enumerate(files, 1):
        # clones, for a file may hold tensors that share their memory
        tensors = {k: t.clone(memory_format=torch.contiguous_format) for k, t in _load(path).items()}
        if spare_head:
            tensors.pop(HEAD, None)
        shard = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        save_file(tensors, fresh / shard, {"format": "pt"})
        where |= dict.fromkeys(tensors, shard)
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": where}
        (fresh / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), "utf-8")
    for path in folder.iterdir():
        if path.suffix in COPIED and path.name != INDEX:
            shutil.copy(path, fresh)


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        names = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(names))]
    else:
        files = [folder / WEIGHTS]
    gone = next((path for path in files if not path.exists()), None)
    if gone is not None:
        raise UserError(f"{gone} does not exist", f"Give a model folder with {WEIGHTS}")
    return files


def _load(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is damaged, or holds more than tensors, which could run code", "Ask its owner for safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__})", "Download it again") from None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{path} is no table of tensors", "Give a checkpoint's weights, not a training state")
    return state
