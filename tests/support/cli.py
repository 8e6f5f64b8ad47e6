"""The command line in this process, and what machines a test can run on."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass

import pytest

compiled_only = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64", reason="compiled steps are for Linux on x86-64"
)


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)
