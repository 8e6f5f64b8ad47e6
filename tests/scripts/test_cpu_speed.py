"""The speed script of compiled steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli import compiled_only

pytestmark = compiled_only


@pytest.mark.slow
def test_the_speed_script_prints_every_step(tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "cpu_speed.py"
    words = ["--shapes", "pocket", "--contexts", "1024", "--rounds", "1"]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=True, cwd=tmp_path)
    (found,) = json.loads(done.stdout.splitlines()[-1])
    assert {"AR", "verify 9", "torch AR", "transformers AR bfloat16"} <= found["steps_ms"].keys()
    assert min(found["steps_ms"].values()) > 0 and len(found["draft_ms"]) == 4
    assert {"ours", "torch", "product"} <= found["prompt_gflops"].keys() and min(found["prompt_gflops"].values()) > 0
