"""A sweep from the command line: contract, stops and restarts, the order of arms, comparison with AR, bad input."""

import os
import signal
import subprocess
import sys
import time

import pytest

from bdcli.bench.methods import EngineMethod
from bdcli.config.decode import DecodeOptions
from bdcli.data.prompts import stdlib_text
from bdcli.decode.pair import load_pair
from bdcli.decode.session import Session
from bdcli.results.store import Store
from bdcli.speculation.baseline import teacher_force
from bdcli.speculation.runner import Runner
from tests.support.bench import BD, SMALL, cells

CONTRACT = {
    "dataset",
    "context",
    "budget",
    "gamma",
    "method",
    "samples",
    "acceptance_rate",
    "acceptance_rate_no_loops",
    "mean_accepted_length",
    "tokens_per_second",
    "ar_tokens_per_second",
    "speedup",
    "speedup_low",
    "speedup_high",
    "loop_rate",
    "output_equal",
    "max_drafter_entries",
    "peak_memory_bytes",
    "valid",
    "invalid_reason",
}


def test_json_keeps_the_contract_and_the_store_agrees(cli):
    done = cli(
        *SMALL[:2],
        "160,200",
        *SMALL[3:],
        "--methods",
        "ar,bd,official,lookup",
        "--budgets",
        "64,full",
        "--gamma",
        "auto,3",
        "--json",
    )
    found = cells(done)
    arms = {"ar", "bd-64", "bd-64-g3", "bd-full", "bd-full-g3", "official-64", "official-64-g3", "lookup", "lookup-g3"}
    assert set(found) == {(c, arm) for c in (160, 200) for arm in arms}
    for cell in found.values():
        assert set(cell) >= CONTRACT and cell["valid"] is True and cell["invalid_reason"] is None, cell
        assert cell["samples"] == 2 and cell["output_equal"] is True and cell["dataset"] == "stdlib"
        assert cell["speedup"] == pytest.approx(cell["tokens_per_second"] / cell["ar_tokens_per_second"])
        assert cell["speedup_low"] <= cell["speedup"] * 1.0001 and cell["speedup"] <= cell["speedup_high"] * 1.0001
        assert cell["ar_tokens_per_second"] == found[cell["context"], "ar"]["tokens_per_second"]
        assert cell["peak_memory_bytes"] > 40e6
    one = found[200, "bd-64-g3"]
    assert (one["budget"], one["gamma"], one["method"]) == (64, 3, "bd") and one["max_drafter_entries"] <= 64
    assert found[200, "bd-full"]["budget"] == "full" and found[200, "bd-full"]["max_drafter_entries"] > 200
    ar = found[200, "ar"]
    assert (ar["budget"], ar["gamma"], ar["speedup"], ar["acceptance_rate"]) == (None, 0, 1.0, None)
    assert ar["ar_variation"] >= 0 and ar["mean_accepted_length"] == 1.0
    rows = {r["run_id"]: r for r in cli("report", "--command", "bench", "--format", "json").json["runs"]}
    assert len(rows) == len(found)
    for cell in found.values():
        row = rows[cell["run_id"]]
        assert {k: row[k] for k in cell if k != "samples"} == {k: v for k, v in cell.items() if k != "samples"}
        assert row["prompts"] == 2 and row["status"] == "done" and row["machine"] and row["experiment"]
        texts = Store().prompts(cell["run_id"])
        assert all(t.text and len(t.tokens) == 12 and sum(r[0] for r in t.rounds) == 12 for t in texts)


def test_samples_are_the_number_in_all_and_prompt_files_one_data_set(cli, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} line {i} of text\n" for i in range(400)))
    files = [word for name in "ab" for word in ("--prompts", tmp_path / f"{name}.txt")]
    found = cells(cli(*SMALL[:3], "--samples", 3, *SMALL[5:], *BD, *files, "--json"))
    cell = found[200, "bd-64-g3"]
    assert cell["dataset"] == "prompts" and cell["samples"] == 3
    assert [p.source.split("@")[0] for p in Store().prompts(cell["run_id"])] == ["a", "b", "a"]


def test_an_interrupted_sweep_continues_and_nothing_is_run_twice(cli, tmp_path):
    """Killed for good while it writes; the next start keeps every finished text."""
    text = tmp_path / "text.txt"
    text.write_text(stdlib_text()[:30_000])
    four = ["4" if word == 2 else str(word) for word in [*SMALL, *BD, "--prompts", text]]
    words = [sys.executable, "-m", "bdcli", *four]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (Store().runs() and any(Store().prompts(r.run_id) for r in Store().runs())):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {(p.run_id, p.index): p.tokens_per_second for r in Store().runs() for p in Store().prompts(r.run_id)}
    assert {r.status for r in Store().runs()} == {"interrupted"} and 0 < len(before) < 8
    done = cli(*four, "--json")
    assert f"{len(before)} of 8 texts are stored" in done.err
    assert all(c["samples"] == 4 and c["valid"] for c in cells(done).values())
    after = {(p.run_id, p.index): p.tokens_per_second for r in Store().runs() for p in Store().prompts(r.run_id)}
    assert len(after) == 8 and before.items() <= after.items()


def test_a_finished_experiment_is_shown_again_and_fresh_measures_again(cli):
    first, again = (cli(*SMALL, *BD, "--json").json for _ in range(2))
    assert first == again
    fresh = cli(*SMALL, *BD, "--fresh", "--json").json
    assert fresh["experiment"] == first["experiment"].replace("-1", "-2") and len(Store().runs()) == 4
    assert cli(*SMALL, *BD, "--seed", 1, "--json").json["experiment"] not in (first["experiment"], fresh["experiment"])


def test_arms_rotate_and_share_the_targets_prefill(cli, monkeypatch):
    order, prefills = [], []
    generate, prefill = EngineMethod.generate, Runner.prefill

    def spy(self, prompt, prepared, seed):
        order.append(self.arm.method)
        return generate(self, prompt, prepared, seed)

    def counting(self, tokens, on_block=None):
        prefills.append(len(self.model.layers))
        return prefill(self, tokens, on_block)

    monkeypatch.setattr(EngineMethod, "generate", spy)
    monkeypatch.setattr(Runner, "prefill", counting)
    cli(*SMALL, "--methods", "ar,bd,full", "--budgets", 64, "--json")
    assert order == ["ar", "bd", "full", "bd", "full", "ar"]
    assert prefills.count(12) == 2 and prefills.count(2) == 4  # once a prompt; each drafting arm its drafter


def test_sampling_is_measured_but_never_called_equal(cli):
    found = cells(cli(*SMALL, "--methods", "ar,bd,lookup", "--budgets", 64, "--temperature", 1, "--json"))
    assert all(c["output_equal"] is None and c["valid"] for c in found.values())


def test_bfloat16_differences_are_judged_by_the_tie_rule(cli, text_ids):
    found = cells(
        cli(*SMALL[:-1], "bfloat16", "--engine", "torch", "--methods", "bd,lookup", "--budgets", 64, "--json")
    )
    assert all(c["output_equal"] is True for c in found.values())
    options = DecodeOptions(dtype="bfloat16", max_new_tokens=24, engine="torch")
    pair, prompt = load_pair(options), text_ids[1000:1200]
    runner = Session(pair, options).target(len(prompt), 8)
    runner.prefill(prompt[:-1])
    text, fed = [], prompt[-1]
    for _ in range(24):
        fed = int(runner.feed([fed], 1).argmax())
        text.append(fed)
    assert teacher_force(runner, prompt, text).equal and runner.length == len(prompt) - 1
    text[11] = (text[11] + 1) % 4096
    judged = teacher_force(runner, prompt, text)
    assert not judged.equal and 0 < judged.logit_error < 0.5


def test_bad_input_is_one_line(cli, tmp_path):
    for words, message in {
        ("--methods", "magic"): "--methods magic: unknown. Known: ar, bd",
        ("--methods", "window"): "reads an undistilled drafter: name it under naive",
        ("--budgets", "8"): "arms.bd-8.budget: must be at least 22",
        ("--ctx", "17k"): "exceed the 16896 positions",
        ("--datasets", "nowhere/at/all"): "data source nowhere/at/all does not exist",
        ("--prompts", tmp_path / "none.txt"): "none.txt does not exist",
        ("--arms", "x"): "--arms x: no such arm",
        ("--samples", 0): "samples: must be at least 1",
        ("--set", "arms.x={method: full, dtype: float32}"): "arms.x.dtype: full runs in the dtype of the recipe",
    }.items():
        done = cli("bench", *words)
        assert done.code == 2 and message in done.err and "Traceback" not in done.err, done
        assert done.out == "" and not Store().runs()
