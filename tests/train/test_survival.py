"""Runs that are killed, and runs of several processes, end where an undisturbed one does. Slow: each is a process."""

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time

import pytest
import torch

from tests.support.training import adds_up, same_weights, write_texts

pytestmark = pytest.mark.slow

RECIPE = """\
seed: 1
precision: float32
data:
  sources: [{texts}]
  context: 192
  windows: 48
  written: 0.5
  written_tokens: 32
  shard_windows: 2
  written_temperature: 0.8
  max_loop_rate: 1.0
views: {{budgets: [40, 100]}}
optimizer: {{steps: {steps}, windows_per_step: 2, warmup: 2}}
evaluation: {{sources: [{texts}], every: {every}, contexts: [64], budgets: [40, full], passages: 3, new_tokens: 16}}
"""
KILLS = 10
# Processes come from a server that has imported everything, so that ten starts take seconds.
PROCESSES = multiprocessing.get_context("forkserver") if os.name == "posix" else None


def recipe(folder, steps=160, every=4):
    texts = write_texts(folder / "texts")
    (folder / "r.yaml").write_text(RECIPE.format(texts=texts, steps=steps, every=every))
    return folder / "r.yaml"


def words(command, path, out, *more):
    return [command, str(path), "--out", str(out), "--json", "--db", f"{out}.db", *more]


def act(arguments, log):
    """In the child: `bdcli ARGUMENTS` with what it prints in files."""
    for number, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    sys.argv = ["bdcli", *arguments]
    from bdcli.cli.main import main

    main()


def start(arguments, log):
    PROCESSES.set_forkserver_preload(
        ["bdcli.cli.main", "bdcli.train.record", "bdcli.backends.cpu.runner", "transformers"]
    )
    for end in ("out", "err"):
        log.with_suffix(f".{end}").unlink(missing_ok=True)
    process = PROCESSES.Process(target=act, args=(arguments, log))
    process.start()
    return process


def finish(arguments, log):
    process = start(arguments, log)
    process.join(300)
    assert process.exitcode == 0, log.with_suffix(".err").read_text()
    return json.loads(log.with_suffix(".out").read_text())


def lines(log):
    """Lines of progress so far."""
    path = log.with_suffix(".err")
    text = path.read_text() if path.exists() else ""
    return sum(phase in line for line in text.splitlines() for phase in ("windows:", "passages:", "distil:"))


def files(folder):
    return {p.name: p.read_bytes() for p in sorted((folder / "data").iterdir()) if not p.name.endswith(".new")}


@pytest.mark.parametrize("command", ["prepare", "distill"])
def test_killed_ten_times_and_gone_on_with(command, tmp_path):
    path, resume = recipe(tmp_path), ("--resume",) if command == "distill" else ()
    whole = finish(words(command, path, tmp_path / "whole"), tmp_path / "log")
    rng, again = random.Random(5), words(command, path, tmp_path / "killed", *resume)
    for turn in range(KILLS):
        process, wanted = start(again, tmp_path / "log"), rng.randint(1, 2)
        while lines(tmp_path / "log") < wanted and process.is_alive():
            time.sleep(0.002)
        process.join(rng.uniform(0, 0.3 if command == "distill" else 0.05))  # somewhere in the work that follows
        assert process.is_alive(), f"ended by itself before kill {turn + 1}: {(tmp_path / 'log.err').read_text()}"
        process.kill()
        process.join()
        assert process.exitcode == -9
    ended = finish(again, tmp_path / "log")
    assert ended["windows"] == whole["windows"] and ended["documents"] == whole["documents"]
    assert adds_up(ended["windows"]) and adds_up(ended["documents"])
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    if command == "distill":
        assert ended["steps"] == whole["steps"] == 160 and ended["after"] == whole["after"]
        assert same_weights(tmp_path / "whole" / "drafter", tmp_path / "killed" / "drafter")
        states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "killed")]
        assert all(torch.equal(a, b) for a, b in zip(*(s["weights"] for s in states), strict=True))


def test_two_processes_give_the_result_of_one(tmp_path):
    path = recipe(tmp_path, steps=12, every=6)
    one = finish(words("distill", path, tmp_path / "one"), tmp_path / "log")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611", "-m", "bdcli"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *words("distill", path, tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode()
    two = json.loads(done.stdout)
    assert two["steps"] == one["steps"] == 12 and two["before"] == one["before"]
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True)["weights"] for name in ("one", "two")]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*states, strict=True))
