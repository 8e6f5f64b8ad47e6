"""The script that checks and measures on a GPU runs from end to end on a CPU, plain operations standing in."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_speed.py"


def test_the_whole_script_runs_and_every_wanted_figure_is_there(tmp_path):
    words = [sys.executable, str(SCRIPT), "--tiny", "--device", "cpu", "--out", "found.json"]
    done = subprocess.run(
        words, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    named = {verdict["what"].split(",")[0].split(":")[0].split(" at ")[0] for verdict in found["verdicts"]}
    assert {"greedy text equals torch's", "draft B=128", "draft", "verify 8 rows", "AR step"} <= named
    assert "host's share of a round" in named
    assert all(text["equal"] and text["accepted"] for text in found["check"]["texts"])
    assert all(isinstance(v["measured"], (int, float)) for v in found["verdicts"])
    engine = found["engine"]
    assert engine["unfused_ar_ms"] > 0 and {"torch", "transformers static"} <= engine["contexts"][0]["peers_ms"].keys()
    assert all(row["sdpa_us"] > 0 and row["flex_us"] > 0 for row in found["attention"]["verify"])
    assert done.stdout.count("wanted") == len(found["verdicts"]) >= 9


def test_it_refuses_to_measure_without_a_gpu(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and "--tiny" in done.stderr
