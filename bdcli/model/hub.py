"""Where a model is: the pocket pair, a local folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path

from bdcli.base.errors import UserError
from bdcli.base.files import user_path
from bdcli.base.places import readable_folder

POCKET = Path(__file__).parent.parent / "assets" / "pocket"
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
_HUB_DUPLICATES = ["consolidated*", "original/*"]  # second copies of the weights in other layouts
_NAMES = "Give a folder, a hub name like owner/model, or pocket"


def resolve(name: str, role: str, pickles: bool = False) -> Path:
    """Folder of a model. `name` is `pocket`, a folder, or a hub name `owner/model`; role is target or drafter.

    From the hub come safetensors, or with `pickles` .bin weights, for `bdcli convert`.
    """
    if name == "pocket":
        return POCKET / role
    path = user_path(name)
    if path.is_dir():
        return readable_folder(path)
    if path.exists():
        raise UserError(f"--{role} {name} is a file", "Give the model's folder, the one that holds config.json")
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
