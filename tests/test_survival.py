"""Runs that are killed, and runs of several processes, end where an undisturbed one does. Slow: each is a process."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from bdcli.checkpoint import load_model

pytestmark = pytest.mark.slow

RECIPE = """\
seed: 1
precision: float32
data: {context: 192, windows: 8, written: 0.5, written_tokens: 32, shard_windows: 2, written_temperature: 0.8}
views: {budgets: [40, 100]}
optimizer: {steps: 12, windows_per_step: 2, warmup: 2}
evaluation: {every: 2, contexts: [64], budgets: [40, full], passages: 3, new_tokens: 16}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


def start(command, recipe, out, *more, launcher=()):
    words = [sys.executable, *launcher, "-m", "bdcli", command, recipe, "--out", out, "--json", *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()
    return json.loads(out)


def weights(folder):
    return load_model(folder, torch.float32, torch.device("cpu")).tensors()


def files(folder):
    return {p.name: p.read_bytes() for p in sorted((folder / "data").iterdir()) if not p.name.endswith(".new")}


@pytest.mark.parametrize("command", ["prepare", "distill"])
def test_killed_ten_times_and_gone_on_with(command, tmp_path, recipe):
    whole = finish(start(command, recipe, tmp_path / "whole"))
    rng, resume, kills = random.Random(5), ("--resume",) if command == "distill" else (), 0
    for _ in range(10):
        process = start(command, recipe, tmp_path / "killed", *resume)
        told = 0
        while told < rng.randint(1, 3) and process.poll() is None:  # so many lines of progress into the work
            told += any(phase in process.stderr.readline() for phase in (b"windows:", b"passages:", b"distil:"))
        time.sleep(rng.uniform(0, 0.4))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    ended = finish(start(command, recipe, tmp_path / "killed", *resume))
    assert kills >= (5 if command == "distill" else 2)
    assert ended["windows"] == whole["windows"] and ended["documents"] == whole["documents"]
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    if command == "distill":
        assert ended["after"] == whole["after"]
        folders = (tmp_path / name / "drafter" for name in ("whole", "killed"))
        assert all(torch.equal(a, b) for a, b in zip(*map(weights, folders), strict=True))


def test_two_processes_give_the_result_of_one(tmp_path, recipe):
    one = finish(start("distill", recipe, tmp_path / "one"))
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611")
    two = finish(start("distill", recipe, tmp_path / "two", launcher=launcher))
    assert two["steps"] == one["steps"] == 12 and two["before"] == one["before"]
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True)["weights"] for name in ("one", "two")]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*states, strict=True))
