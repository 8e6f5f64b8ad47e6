"""The gates of a sweep and of the report: each planted fraud makes its cell invalid, with the reason."""

import json
import os
import re
import shutil
import sqlite3

import pytest
import torch
from safetensors.torch import load_file, save_file

from bdcli.bench.sweep import Sweep
from bdcli.config.bench import Arm, BenchRecipe
from bdcli.model.hub import POCKET
from bdcli.results.store import Store
from bdcli.speculation import speculator as speculate
from bdcli.speculation.sampling import Verdict, best_tokens
from tests.support.bench import BD, SMALL, reasons


def changed(tmp_path, role, name, value):
    folder = tmp_path / role
    shutil.copytree(POCKET / role, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name] = torch.full_like(weights[name], value)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


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
    found = reasons(cli(*SMALL, *BD, "--target", folder, "--max-new-tokens", 100, "--json"))
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
