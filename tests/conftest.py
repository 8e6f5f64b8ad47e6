"""Fixtures of several test files: the pocket pair, real text, and the command line in-process."""

from __future__ import annotations

import contextlib
import io
import os
import sys

import pytest
import torch

from bdcli.data.prompts import stdlib_text
from bdcli.model.checkpoint import load_model
from bdcli.model.hub import POCKET
from bdcli.model.tokenizer import load_tokenizer
from tests.support.cli import Outcome

torch.set_num_threads(1)  # two xdist workers share two cores
os.environ["OMP_NUM_THREADS"] = "1"  # and so do compiled steps and the processes that tests start


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    """No test touches the user's store."""
    monkeypatch.setenv("BDCLI_DB", str(tmp_path / "runs.db"))


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Floats that nobody has written are NaN, so that reading them cannot go unnoticed."""

    def poisoned(make):
        def run(*args, **kwargs):
            made = make(*args, **kwargs)
            if made.is_floating_point() and made.device.type == "cpu":
                made.detach().fill_(torch.nan)
            return made

        return run

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(scope="session")
def pocket():
    """(target, drafter, tokenizer) in fp32."""
    cpu = torch.device("cpu")
    target, drafter = (load_model(POCKET / role, torch.float32, cpu) for role in ("target", "drafter"))
    return target, drafter, load_tokenizer(POCKET / "target")


@pytest.fixture(scope="session")
def text_ids(pocket):
    """Token ids of real held-out text, enough for 16K prompts."""
    return pocket[2](stdlib_text()[:400_000], verbose=False)["input_ids"]


@pytest.fixture
def cli(monkeypatch):
    """Run `bdcli ...` in this process, through the real entry point."""
    from bdcli.cli.main import main

    def run(*args: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["bdcli", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
            main()
        return Outcome(stop.value.code or 0, out.getvalue(), err.getvalue())

    return run
