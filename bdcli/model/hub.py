"""Where a model is: the pocket pair, a known name, a local folder or GGUF file, or a name on the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path

from bdcli.base.errors import UserError
from bdcli.base.files import user_path
from bdcli.base.places import readable_folder
from bdcli.model.gguf.file import SUFFIX, parts
from bdcli.model.known import KNOWN, fetched

POCKET = Path(__file__).parent.parent / "assets" / "pocket"
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
_HUB_DUPLICATES = ["consolidated*", "original/*"]  # second copies of the weights in other layouts
NAMED = ("pocket", *KNOWN)  # models that are named without a place
_NAMES = f"Give a folder, a {SUFFIX} file, a hub name like owner/model, or one of: {', '.join(NAMED)}"


def resolve(name: str, role: str, pickles: bool = False) -> Path:
    """Folder or GGUF file of a model, the first one where the file is split; role is target or drafter.

    `name` is `pocket`, a known name, a folder, a GGUF file, or a hub name `owner/model`. From the hub come safetensors,
    or with `pickles` .bin weights, for `bdcli convert`.
    """
    if name == "pocket":
        return POCKET / role
    if name in KNOWN:
        return fetched(name)
    path = user_path(name)
    if path.is_dir():
        return _in_folder(readable_folder(path))
    if path.suffix == SUFFIX and (path.is_file() or path.parent.is_dir()):
        return _first_part(path)
    if path.exists():
        hint = f"Give the model's folder, the one that holds config.json, or a {SUFFIX} file"
        raise UserError(f"--{role} {name} is a file", hint)
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise UserError(f"--{role} {name}: no such folder", _NAMES)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    hint = f"Download it where there is a network: hf download {name}; then pass its folder"
    try:
        wanted = [*_HUB_FILES, *(["pytorch_model*.bin"] if pickles else [])]
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=_HUB_DUPLICATES))
    except GatedRepoError:
        raise UserError(f"--{role} {name}: its owner asks for a login", f"Run hf auth login, then: {hint}") from None
    except RepositoryNotFoundError:
        raise UserError(f"--{role} {name}: neither a folder here nor a model on the hub", hint) from None
    except HFValidationError:
        raise UserError(f"--{role} {name}: neither a folder here nor a hub name", _NAMES) from None
    except Exception as error:  # the hub raises many kinds, those of its HTTP library among them
        reason = type(error).__name__
        raise UserError(
            f"--{role} {name}: not in the local cache and the hub did not answer ({reason})", hint
        ) from None


def _in_folder(folder: Path) -> Path:
    """The folder, or the one model in GGUF files that it holds in place of a config.json."""
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if (folder / "config.json").exists() or not files:
        return folder
    models = sorted({_first_part(file) for file in files})
    if len(models) > 1:
        raise UserError(f"{folder} holds several models: {', '.join(m.name for m in models)}", "Name one of the files")
    return models[0]


def _first_part(path: Path) -> Path:
    first = parts(path)[0]
    if not first.is_file():
        raise UserError(f"{first}: no such file", _NAMES)
    return first


def read_model_json(path: Path) -> dict:
    try:
        parsed = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", "Point at a Hugging Face model folder") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", "Give a readable model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error})", "Download it again") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{path} is not a JSON object", "Download it again")
    return parsed
