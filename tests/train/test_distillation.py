"""A distil run: it measures before and after, survives being stopped, and keeps the best drafter."""

import json
from dataclasses import replace

import pytest
import torch

from bdcli.base.errors import UserError
from bdcli.model.checkpoint import load_model
from bdcli.model.hub import POCKET
from bdcli.train.acceptance import Cell
from bdcli.train.distill.checks import missing_inputs
from bdcli.train.distill.run import Distillation
from tests.support.training import SMALL_DISTILL, Figures, Stop, StopAt, adds_up, same_weights, weights_of


def test_a_run_measures_before_and_after_and_writes_a_drafter(tmp_path):
    figures = Figures()
    job = Distillation(SMALL_DISTILL, tmp_path / "run", figures)
    assert any("supervised positions" in line for line in job.plan().lines())
    outcome = job.run(resume=False)
    assert outcome.status == "done" and outcome.steps == 6 and outcome.skipped == 0
    assert [at for at, _ in figures.found] == [{"step": 0}, {"step": 3}, {"step": 6}]
    assert figures.found[0][1] == outcome.before
    assert {(c.context, c.budget) for c in outcome.before} == {(c, b) for c in (64, 128) for b in (40, 100, "full")}
    assert outcome.windows["kept"] == 5 and adds_up(outcome.windows) and adds_up(outcome.documents)
    changed = zip(weights_of(outcome.initial), job.models().drafter.tensors(), strict=True)
    assert not all(torch.equal(a, b) for a, b in changed)
    assert outcome.positions_per_target_token == 4
    saved = json.loads((tmp_path / "run" / "data" / "passages.json").read_text("utf-8"))["passages"]
    assert all(0 <= p["loop_rate"] <= 1 for p in saved) and any(p["loop_rate"] for p in saved)
    with pytest.raises(UserError, match="holds an earlier run"):
        Distillation(SMALL_DISTILL, tmp_path / "run").run(resume=False)


def test_without_a_drafter_the_targets_first_layers_are_the_start(tmp_path):
    recipe = replace(SMALL_DISTILL, drafter=None, layers=1, optimizer=replace(SMALL_DISTILL.optimizer, steps=2))
    job = Distillation(recipe, tmp_path / "run")
    assert any("drafter of its first 1 layers" in line for line in job.plan().lines())
    assert not (tmp_path / "run").exists(), "a plan writes nothing"
    drafter = job.models().drafter
    assert len(drafter.layers) == 1
    target = load_model(POCKET / "target", torch.float32, torch.device("cpu"))
    assert torch.equal(drafter.layers[0].qkv, target.layers[0].qkv)
    assert [p for _, p in missing_inputs(recipe, tmp_path / "run", tmp_path / "run" / "data")] == []
    done = job.run(resume=False)
    assert torch.equal(weights_of(done.initial)[0], target.embedding) and done.steps == 2
    again = Distillation(recipe, tmp_path / "run").run(resume=True)  # from the same start
    assert again.steps == 2 and again.after == done.after
    Distillation(replace(recipe, layers=3), tmp_path / "tried").models()  # as a run that did not get far
    assert len(Distillation(recipe, tmp_path / "tried").models().drafter.layers) == 1
    other = replace(recipe, target=str(POCKET / "drafter"))
    assert "target" in [key for key, _ in missing_inputs(other, tmp_path / "run", tmp_path / "run" / "data")]


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    undisturbed = Distillation(SMALL_DISTILL, tmp_path / "whole")
    undisturbed.run(resume=False)
    whole = undisturbed.models().drafter.tensors()
    for stop in (1, 4):
        folder = tmp_path / f"stopped{stop}"
        with pytest.raises(Stop):
            Distillation(SMALL_DISTILL, folder, StopAt("distil", stop)).run(resume=False)
        again = Distillation(SMALL_DISTILL, folder)
        outcome = again.run(resume=True)
        assert outcome.steps == 6
        assert all(torch.equal(a, b) for a, b in zip(whole, again.models().drafter.tensors(), strict=True))


def test_out_of_time_still_measures(tmp_path):
    outcome = Distillation(SMALL_DISTILL, tmp_path / "run", deadline=0.0).run(resume=False)
    assert outcome.stopped == "out of time" and outcome.steps == 1 and outcome.after
    assert outcome.windows["kept"] == 5, "windows need no target: those that it was to write keep the corpus text"
    manifest = json.loads((tmp_path / "run" / "data" / "manifest.json").read_text())
    assert sum(shard["late"] for shard in manifest["shards"]) > 0


def test_a_drafter_is_judged_outside_loops(tmp_path, monkeypatch):
    """A text that repeats itself is guessed by any drafter: what only gains there is not kept."""
    measured = iter([(0.2, 0.3), (0.9, 0.29), (0.1, 0.31), (0.3, None)])

    def grid(*_):
        rate, clean = next(measured)
        yield Cell("x", 64, 40, 5, rate, clean, None, None, 2.0, 3)

    monkeypatch.setattr("bdcli.train.distill.judge.acceptance_grid", grid)
    short = replace(SMALL_DISTILL, evaluation=replace(SMALL_DISTILL.evaluation, every=2))
    outcome = Distillation(short, tmp_path / "run").run(resume=False)
    assert outcome.best_step == 4 and next(measured, None) is None


def test_training_stops_when_acceptance_does_not_get_better_and_keeps_the_best(tmp_path):
    """A rate of nearly nothing never betters the first grid: two more are measured, then it ends."""
    still = replace(
        SMALL_DISTILL,
        optimizer=replace(SMALL_DISTILL.optimizer, lr=1e-12, steps=30),
        evaluation=replace(SMALL_DISTILL.evaluation, every=2, patience=2),
    )
    job = Distillation(still, tmp_path / "run")
    assert any("stops after 2 measurements" in line for line in job.plan().lines())
    outcome = job.run(resume=False)
    assert (outcome.status, outcome.stopped, outcome.steps) == ("done", "no better for 2 measurements", 4)
    assert outcome.best_step == 0 and outcome.after == outcome.before
    assert same_weights(outcome.checkpoint, outcome.initial)
    again = Distillation(still, tmp_path / "run").run(resume=True)
    assert again.steps == 4 and again.stopped == outcome.stopped


def test_damaged_and_foreign_states_are_refused_and_kept(tmp_path):
    Distillation(SMALL_DISTILL, tmp_path / "run", deadline=0.0).run(resume=False)
    state = tmp_path / "run" / "state.pt"
    other = replace(
        SMALL_DISTILL, optimizer=replace(SMALL_DISTILL.optimizer, lr=1e-5)
    )  # the material fits, the state does not
    with pytest.raises(UserError, match="belongs to another recipe"):
        Distillation(other, tmp_path / "run").run(resume=True)
    broken = state.read_bytes()[:5000]
    state.write_bytes(broken)
    with pytest.raises(UserError, match="is damaged"):
        Distillation(SMALL_DISTILL, tmp_path / "run").run(resume=True)
    assert state.read_bytes() == broken


def test_the_command(tmp_path, cli):
    path = tmp_path / "small.yaml"
    path.write_text(
        "data: {context: 192, windows: 3, written: 0, written_tokens: 16}\nviews: {budgets: [40, 100]}\n"
        "optimizer: {steps: 2}\nevaluation: {contexts: [64], budgets: [40, full], passages: 3, new_tokens: 16}\n"
    )
    plan = cli("distill", path, "--dry-run", "--out", tmp_path / "run")
    assert plan.code == 0 and "supervised positions" in plan.err and "memory about" in plan.err
    done = cli("distill", path, "--out", tmp_path / "run", "--json")
    result = done.json
    assert done.code == 0 and {"run_id", "initial", "checkpoint", "before", "after"} <= set(result)
    wanted = {"dataset", "context", "budget", "acceptance_rate", "mean_accepted_length"}
    assert all(wanted <= set(cell) for cell in result["before"] + result["after"])
    row = cli("report", "--format", "json", "--command", "distill").json["runs"][0]
    assert row["run_id"] == result["run_id"] and row["status"] == "done" and row["config"]["optimizer"]["steps"] == 2
    from bdcli.results.store import Store

    assert len(Store().evaluations(result["run_id"])) == 2 * 2
    curve = cli("report", "--run", result["run_id"], "--plot", tmp_path / "curve.svg")
    assert curve.code == 0 and "step 2" in curve.out and (tmp_path / "curve.svg").stat().st_size > 5000
    assert len(cli("report", "--run", result["run_id"], "--format", "json").json["evaluations"]) == 4
    assert cli("report", "--run", "nope").code == 2
    prompt = tmp_path / "p.txt"
    cli("prompt", "--ctx", 128, "--out", prompt)
    decoded = cli("decode", prompt, "--drafter", result["checkpoint"], "--max-new-tokens", 8, "--json").json
    assert decoded["drafted"] > 0
    made = cli("prepare", path, "--out", tmp_path / "made", "--json").json
    assert adds_up(made["windows"]) and adds_up(made["documents"]) and made["shards"] == 1 and made["passages"] == 3
    again = cli("distill", path, "--out", tmp_path / "run")
    assert again.code == 2 and "--resume" in again.err
    bad = cli("distill", path, "--set", "optimizer.stepz=3", "--out", tmp_path / "x")
    assert bad.code == 2 and "did you mean optimizer.steps?" in bad.err and not (tmp_path / "x").exists()
