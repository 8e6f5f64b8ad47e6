"""A sweep from the command line: contract, prompts that end alike, going on after a kill, peers, planted frauds."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from bdcli.base.errors import UserError
from bdcli.bench.methods import METHODS, EngineMethod
from bdcli.config.decode import DecodeOptions
from bdcli.data.prompts import stdlib_text
from bdcli.data.samples import load_samples
from bdcli.decode.pair import load_pair
from bdcli.decode.session import Session
from bdcli.model.hub import POCKET
from bdcli.results.store import Store
from bdcli.speculation import speculator as speculate
from bdcli.speculation.baseline import teacher_force
from bdcli.speculation.runner import Runner
from bdcli.speculation.sampling import Verdict, best_tokens

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
SMALL = ["bench", "--ctx", "200", "--samples", 2, "--max-new-tokens", 12, "--dtype", "float32"]
BD = ["--methods", "bd", "--budgets", 64, "--gamma", 3]


@pytest.fixture(autouse=True)
def _short_corpus(monkeypatch):
    monkeypatch.setattr("bdcli.data.sources.stdlib_text", lambda: stdlib_text()[:60_000])


def cells(done):
    assert done.code == 0, done.err
    return {(c["context"], c["arm"]): c for c in done.json["cells"]}


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


def test_every_context_of_a_sample_ends_at_the_same_token_inside_the_file(pocket, tmp_path):
    file = tmp_path / "book.txt"
    file.write_text(" ".join(f"word{i}" for i in range(900)), "utf-8")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    whole = tuple(pocket[2](file.read_text())["input_ids"])
    samples = load_samples(pocket[2], "d", [str(file), str(short)], 3, 600)
    ends = []
    for sample in samples:
        long, brief = sample.prompt(600), sample.prompt(100)
        assert len(long) == 600 and len(brief) == 100 and long[-100:] == brief
        ends.append(next(e for e in range(600, len(whole) + 1) if whole[e - 600 : e] == tuple(long)))
    assert ends == sorted(set(ends)) and ends[0] > 600 and ends[-1] < len(whole)
    with pytest.raises(UserError, match=r"no document of d .* has 6000 tokens; 2 are shorter"):
        load_samples(pocket[2], "d", [str(file), str(short)], 3, 6000)


def test_questions_are_never_cut_and_a_bos_is_kept(pocket, tmp_path):
    class WithBos:
        def __call__(self, text, **_):
            return {"input_ids": [0, *pocket[2](text)["input_ids"]]}

    file = tmp_path / "qa.jsonl"
    rows = [{"context": f"document {n} " * 200, "input": f"What is {n}?"} for n in range(3)]
    file.write_text("\n".join(map(json.dumps, rows)))
    samples = load_samples(WithBos(), "qa", [str(file)], 9, 300)
    assert len(samples) == 3  # each question once
    for n, sample in enumerate(samples):
        prompt = sample.prompt(120)
        assert prompt[0] == 0 and prompt.count(0) == 1 and len(prompt) == 120
        assert pocket[2].decode(prompt[1:]).endswith(f"document {n} \n\nWhat is {n}?")


def test_samples_are_the_number_in_all_and_prompt_files_one_data_set(cli, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} line {i} of text\n" for i in range(400)))
    files = [word for name in "ab" for word in ("--prompts", tmp_path / f"{name}.txt")]
    found = cells(cli(*SMALL[:3], "--samples", 3, *SMALL[5:], *BD, *files, "--json"))
    cell = found[200, "bd-64-g3"]
    assert cell["dataset"] == "prompts" and cell["samples"] == 3
    assert [p.source.split("@")[0] for p in Store().prompts(cell["run_id"])] == ["a", "b", "a"]


def test_an_interrupted_sweep_goes_on_and_nothing_is_run_twice(cli, tmp_path):
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


def test_a_finished_experiment_is_shown_again_and_fresh_measures_anew(cli):
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


def test_peers_write_the_same_text_and_are_shown_beside(cli):
    done = cli(*SMALL, "--methods", "hf-ar,hf-static,hf-assisted,hf-lookup", "--gamma", "auto,4", "--json")
    found = cells(done)
    plain = {"ar", "hf-ar", "hf-static"}
    assert {arm for _, arm in found} == plain | {"hf-assisted", "hf-assisted-g4", "hf-lookup", "hf-lookup-g4"}
    for cell in found.values():
        assert cell["output_equal"] is True and cell["valid"] and cell["speedup"] > 0, cell
    assisted = found[200, "hf-assisted-g4"]
    assert 0 < assisted["acceptance_rate"] < 1 and assisted["mean_accepted_length"] > 1


def test_a_peer_runs_in_a_dtype_of_its_own(cli):
    arms = [f"arms.{name}={{method: hf-ar, dtype: {name}}}" for name in ("float32", "bfloat16")]
    words = [word for arm in arms for word in ("--set", arm)]
    found = cells(cli(*SMALL, *words, "--arms", "float32,bfloat16", "--json"))
    assert {arm: c["dtype"] for (_, arm), c in found.items()} == {
        "ar": "float32",
        "float32": "float32",
        "bfloat16": "bfloat16",
    }
    assert all(c["valid"] and c["speedup"] > 0 for c in found.values())
    assert found[200, "float32"]["output_equal"] is True
    assert all(r["valid"] for r in cli("report", "--format", "json").json["runs"])


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


# -- planted frauds: each has to make the cell invalid, with the reason


def changed(tmp_path, role, name, value):
    folder = tmp_path / role
    shutil.copytree(POCKET / role, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name] = torch.full_like(weights[name], value)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def reasons(done):
    return {arm: cell["invalid_reason"] for (_, arm), cell in cells(done).items()}


def test_a_drafter_that_emits_nan(cli, tmp_path):
    folder = changed(tmp_path, "drafter", "model.norm.weight", float("nan"))
    found = reasons(cli(*SMALL, *BD, "--drafter", folder, "--json"))
    assert found["ar"] is None and "drafter produced non-finite logits" in found["bd-64-g3"]


def test_a_target_that_emits_nan_leaves_nothing_to_report(cli, tmp_path):
    folder = changed(tmp_path, "target", "model.norm.weight", float("nan"))
    done = cli(*SMALL, *BD, "--target", folder, "--json")
    assert done.code == 1 and "no cell could be measured" in done.err
    assert not any(c["valid"] for c in done.json["cells"])


def test_a_target_that_loops_one_token(cli, tmp_path):
    folder = changed(tmp_path, "target", "model.norm.weight", 0.0)  # all logits 0: token 0 for ever
    found = reasons(cli(*SMALL, *BD, "--target", folder, "--max-new-tokens", 40, "--json"))
    assert "the text loops" in found["ar"] and "the text loops" in found["bd-64-g3"]


def test_an_engine_that_ignores_eos(cli, tmp_path, monkeypatch):
    target = tmp_path / "target"
    shutil.copytree(POCKET / "target", target)
    free = cli(*SMALL, "--methods", "ar", "--json").json["cells"][0]
    token = Store().prompts(free["run_id"])[0].tokens[5]
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": token}))
    honest = reasons(cli(*SMALL, *BD, "--target", target, "--json"))
    assert honest == {"ar": None, "bd-64-g3": None}
    rounds = speculate.Speculator.rounds

    def deaf(self, limit, eos, controller):
        return rounds(self, limit, eos if self.drafter is None else frozenset(), controller)

    monkeypatch.setattr(speculate.Speculator, "rounds", deaf)
    found = reasons(cli(*SMALL, *BD, "--target", target, "--fresh", "--json"))
    assert found["ar"] is None and "continues after an end token" in found["bd-64-g3"]


def test_a_verify_that_accepts_everything(cli, monkeypatch):
    fraud = lambda draft, logits: Verdict([*draft, best_tokens(logits, "target")[-1]], len(draft))  # noqa: E731
    monkeypatch.setattr(speculate, "verify_greedy", fraud)
    found = reasons(cli(*SMALL, *BD, "--json"))
    assert found["ar"] is None and "2 of 2 texts differ from AR's" in found["bd-64-g3"]


def test_one_sample_is_too_few(cli):
    found = reasons(cli(*SMALL[:3], "--samples", 1, *SMALL[5:], *BD, "--json"))
    assert all("1 sample, at least 2 are needed" in why for why in found.values())


def edit(sql):
    with sqlite3.connect(os.environ["BDCLI_DB"]) as connection:
        assert connection.execute(sql).rowcount > 0


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A store with one sweep over two contexts."""
    from bdcli.bench.sweep import Sweep
    from bdcli.config.bench import Arm, BenchRecipe

    place = tmp_path_factory.mktemp("honest") / "runs.db"
    store = Store(str(place))
    arms = {"bd-64-g3": Arm("bd", 64, 3)}
    recipe = BenchRecipe(contexts=(160, 200), samples=2, max_new_tokens=8, dtype="float32", arms=arms)
    assert Sweep(recipe, store).run()["status"] == "done"
    store.close()
    return place


@pytest.mark.parametrize(
    ("sql", "why"),
    [
        ("UPDATE run SET machine = 'a faster one' WHERE arm = 'bd-64-g3'", "another machine"),
        ("UPDATE run SET machine = 'a faster one'", "was changed after it was measured"),
        ("UPDATE run SET speedup = 9.0 WHERE arm = 'bd-64-g3'", "the row was changed after it was measured"),
        (
            "UPDATE prompt SET tokens_per_second = 1.0 WHERE id IN (SELECT id FROM prompt JOIN run USING (run_id) "
            "WHERE arm = 'ar')",
            "its AR baseline was changed",
        ),
        (
            "UPDATE run SET ar_run_id = (SELECT run_id FROM run WHERE arm = 'ar' AND context = 160) "
            "WHERE arm = 'bd-64-g3' AND context = 200",
            r"its AR baseline has another context \(160, not 200\)",
        ),
        ("UPDATE run SET ar_run_id = NULL WHERE arm = 'bd-64-g3'", "no AR baseline"),
    ],
)
def test_report_refuses_rows_that_were_edited(cli, honest, sql, why):
    shutil.copy(honest, os.environ["BDCLI_DB"])
    assert all(r["valid"] for r in cli("report", "--format", "json").json["runs"])
    edit(sql)
    done = cli("report", "--format", "json")
    row = next(r for r in done.json["runs"] if r["arm"] == "bd-64-g3" and r["context"] == 200)
    assert row["valid"] is False and row["speedup"] is None and row["ar_tokens_per_second"] is None
    assert re.search(why, row["invalid_reason"]), row["invalid_reason"]
    assert "refused" in done.err


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


def test_every_method_is_documented():
    from bdcli.config.bench import ENGINE_METHODS, PEER_METHODS

    assert set(METHODS) == {*ENGINE_METHODS, *PEER_METHODS}
    assert all(METHODS[name].peer == (name in PEER_METHODS) for name in METHODS)
