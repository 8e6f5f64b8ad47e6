"""A prompt file for the commands."""

import pytest


@pytest.fixture
def prompt(tmp_path, cli):
    path = tmp_path / "prompt.txt"
    assert cli("prompt", "--ctx", "300", "--out", path).code == 0
    return path
