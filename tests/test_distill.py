"""Distilling: training sees what decoding sees, the grid is what decoding does, and a run survives being stopped."""

import json
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

from bdcli.cache import BudgetCache, FullCache
from bdcli.checkpoint import POCKET, load_model, save_model
from bdcli.controller import FixedGamma
from bdcli.errors import NonFiniteError, UserError
from bdcli.prompts import HELD_OUT
from bdcli.rope import RopeTable
from bdcli.sampling import Sampling
from bdcli.speculate import Reader, Speculator
from bdcli.train.acceptance import Passage, acceptance_cell, hits, replay
from bdcli.train.data import documents, held_out_prompts, training_windows
from bdcli.train.distill import Distillation, Watcher
from bdcli.train.distill_recipe import Data, DistillRecipe, Evaluation, Optimizer, Views
from bdcli.train.trainer import Trainer
from bdcli.train.view_forward import view_hidden
from bdcli.views import View, plan_view


def decode_logits(model, ids, view):
    """Logits of every position as the decode caches give them, one token a forward."""
    cache = FullCache(model, len(ids)) if view is None else BudgetCache(model, len(ids), view)
    return torch.cat([model.forward([token], cache, 1) for token in ids])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("rebased", "widest"), [(True, 512), (False, 512), (True, 6), (False, 13)])
def test_training_views_equal_decoding(rebased, widest, kv_heads, monkeypatch):
    monkeypatch.setattr("bdcli.train.view_forward.MIN_BLOCK", 5)
    monkeypatch.setattr("bdcli.train.view_forward.MAX_BLOCK", widest)
    rng = random.Random(kv_heads)
    model = tiny_model(layers=2, kv_heads=kv_heads, seed=rng.randrange(99))
    ids = [rng.randrange(41) for _ in range(131)]
    views = [None, View(24, 4, 0, 5, rebased), View(60, 1, 0, 3, rebased), View(400, 4, 0, 8, rebased)]
    table = RopeTable(model.config.rope, len(ids), len(ids), torch.float32, "cpu")
    hidden = view_hidden(model, table, torch.tensor(ids), views)
    for view, x in zip(views, hidden):
        want = decode_logits(model, ids, view)
        assert (model.logits(x) - want).abs().max() < 2e-4 * want.abs().max()
    apart = [(hidden[0] - x).abs().max() for x in hidden[1:3]]
    assert min(apart) > 1e-2, "the views would be the same even if the budget were ignored"


def test_all_weights_get_gradients_through_every_view():
    model = tiny_model(layers=2)
    trainer = Trainer(model, Optimizer())
    table = RopeTable(model.config.rope, 90, 90, torch.float32, "cpu")
    x = view_hidden(model, table, torch.arange(90) % 41, [View(24, 4, 0, 5, True)])
    loss = model.logits(x[0]).square().mean()
    loss.backward()
    assert all(t.grad is not None and bool(t.grad.abs().sum() > 0) for t in trainer.parameters)


@pytest.mark.parametrize("budget", [None, 64, 200])
@pytest.mark.parametrize("gamma", [1, 4, 7])
def test_the_replayed_grid_is_what_decoding_does(gamma, budget, pocket, text_ids):
    target, drafter, _ = pocket
    prompt, new = text_ids[3000:3301], 60
    engine = Speculator(
        Reader(target, FullCache(target, 400)),
        Reader(drafter, FullCache(drafter, 400) if budget is None else BudgetCache(
            drafter, 400, plan_view(budget, "window", "rebased", gamma, len(prompt) - 1)
        )),
        Sampling(), 0,
    )  # fmt: skip
    engine.prefill(prompt)
    steps = list(engine.rounds(new, frozenset(), FixedGamma(gamma)))
    passage = Passage("x", tuple(prompt), tuple(engine.new_tokens), new)
    found = hits(drafter, passage, budget, "window", "rebased", gamma)
    played = replay(found, gamma, new)
    assert (played.drafted, played.accepted, played.rounds) == (
        sum(s.drafted for s in steps),
        sum(s.accepted for s in steps),
        len(steps),
    )
    assert 0 < played.accepted < played.drafted


def test_replay_by_hand():
    played = replay([True, True, False, True, False, True], gamma=2, limit=6)
    # rounds: TT + one more (at 2), T + recovered (at 4), the last token alone
    assert (played.rounds, played.drafted, played.accepted) == (3, 2 + 2 + 0, 2 + 1)


def test_interval_covers_the_rate(pocket, text_ids):
    passages = [
        Passage("x", tuple(text_ids[s : s + 100]), tuple(text_ids[s + 100 : s + 140]), 40) for s in range(0, 5000, 900)
    ]
    cell = acceptance_cell(pocket[1], passages, 64, "window", "rebased", 3)
    assert cell.low <= cell.acceptance_rate <= cell.high and cell.passages == 6


def test_saved_models_come_back_and_transformers_reads_them(tmp_path):
    from transformers import AutoModelForCausalLM

    model = load_model(POCKET / "drafter", torch.float32, torch.device("cpu"))
    with torch.no_grad():
        model.layers[0].gate_up.add_(torch.randn_like(model.layers[0].gate_up).bfloat16().float())
    save_model(model, POCKET / "drafter", tmp_path / "d")
    again = load_model(tmp_path / "d", torch.float32, torch.device("cpu"))
    assert all(torch.allclose(a, b, rtol=1e-2) for a, b in zip(model.tensors(), again.tensors(), strict=True))
    ids = torch.arange(5, 45)[None]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "d", dtype=torch.float32)(ids).logits[0]
    ours = again.forward(ids[0].tolist(), FullCache(again, 40), 40)
    assert torch.allclose(ours, theirs, atol=1e-3)


# -- data


def test_training_text_never_holds_measured_text(pocket):
    tokenizer = pocket[2]
    names = {d.name for d in documents("stdlib") if not d.held_out}
    assert len(names) > 100 and not names & {*HELD_OUT, "held out"}
    windows = training_windows(tokenizer, ["stdlib"], 512, 5, seed=3)
    assert [len(w) for w in windows] == [512] * 5
    assert windows != training_windows(tokenizer, ["stdlib"], 512, 5, seed=4)


def test_sources_from_files(tmp_path, pocket):
    (tmp_path / "a.txt").write_text("word " * 4000, "utf-8")
    rows = [{"text": f"row {i} " * 900} for i in range(40)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    docs = list(documents(str(tmp_path)))
    assert len(docs) == 41 and 0 < sum(d.held_out for d in docs) < 12
    prompts = held_out_prompts(pocket[2], [str(tmp_path / "b.jsonl")], 200, 3)
    assert [len(ids) for _, ids in prompts] == [200] * 3 and prompts[0][0] == "b"
    with pytest.raises(UserError, match="not 4000"):
        training_windows(pocket[2], [str(tmp_path)], 4096, 4000, 0)
    for bad in ("nowhere.txt", str(tmp_path / "empty")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError):
            list(documents(bad))
    (tmp_path / "c.jsonl").write_text('{"words": 3}\n', "utf-8")
    with pytest.raises(UserError, match=r"c.jsonl:1 has none of the fields"):
        list(documents(str(tmp_path / "c.jsonl")))


# -- runs

SMALL = DistillRecipe(
    data=Data(context=192, windows=5, written=0.4, written_tokens=32),
    views=Views(budgets=(40, 100)),
    optimizer=Optimizer(steps=6, lr=2e-3, warmup=2),
    evaluation=Evaluation(every=3, contexts=(64, 128), budgets=(40, 100, "full"), passages=3, new_tokens=24),
)


def weights_of(folder):
    return load_model(folder, torch.float32, torch.device("cpu")).tensors()


def test_a_run_measures_before_and_after_and_writes_a_drafter(tmp_path):
    grids = []
    job = Distillation(SMALL, tmp_path / "run", Watcher(grid=lambda step, cells: grids.append((step, cells))))
    assert any("supervised positions" in line for line in job.plan())
    outcome = job.run(resume=False)
    assert outcome.status == "done" and outcome.steps == 6 and outcome.skipped == 0
    assert [step for step, _ in grids] == [0, 3, 6]
    assert {(c.context, c.budget) for c in outcome.before} == {(c, b) for c in (64, 128) for b in (40, 100, "full")}
    assert outcome.dropped["read"] == 5 and outcome.dropped["written"] == 2
    changed = zip(weights_of(outcome.initial), job.drafter.tensors(), strict=True)
    assert not all(torch.equal(a, b) for a, b in changed)
    assert outcome.positions_per_target_token == 4
    with pytest.raises(UserError, match="holds an earlier run"):
        Distillation(SMALL, tmp_path / "run", Watcher()).run(resume=False)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    whole = Distillation(SMALL, tmp_path / "whole", Watcher())
    whole.run(resume=False)
    for stop in (1, 4):

        class Stop(Exception):
            pass

        def raise_at(phase, done, _total, _note, stop=stop, error=Stop):
            if phase == "distil" and done == stop:
                raise error

        folder = tmp_path / f"stopped{stop}"
        with pytest.raises(Stop):
            Distillation(SMALL, folder, Watcher(progress=raise_at)).run(resume=False)
        again = Distillation(SMALL, folder, Watcher())
        outcome = again.run(resume=True)
        assert outcome.steps == 6
        assert all(torch.equal(a, b) for a, b in zip(whole.drafter.tensors(), again.drafter.tensors(), strict=True))


def test_out_of_time_still_measures(tmp_path):
    outcome = Distillation(SMALL, tmp_path / "run", Watcher(), deadline=0.0).run(resume=False)
    assert outcome.stopped == "out of time" and outcome.steps == 1 and outcome.after


def test_damaged_and_foreign_states_are_refused_and_kept(tmp_path):
    Distillation(SMALL, tmp_path / "run", Watcher(), deadline=0.0).run(resume=False)
    state = tmp_path / "run" / "state.pt"
    other = replace(SMALL, optimizer=replace(SMALL.optimizer, lr=1e-5))
    with pytest.raises(UserError, match="belongs to another recipe"):
        Distillation(other, tmp_path / "run", Watcher()).run(resume=True)
    broken = state.read_bytes()[:5000]
    state.write_bytes(broken)
    with pytest.raises(UserError, match="is damaged"):
        Distillation(SMALL, tmp_path / "run", Watcher()).run(resume=True)
    assert state.read_bytes() == broken


def test_views_and_order_depend_on_seed_and_step_alone(tmp_path):
    job = Distillation(SMALL, tmp_path / "a", Watcher())
    twin = Distillation(SMALL, tmp_path / "b", Watcher())
    for step in range(7):
        assert job.draw_views(step) == twin.draw_views(step) and job.order(step) == twin.order(step)
        budgets = [v.budget for v in job.draw_views(step)[1:]]
        assert budgets[:2] == [40, 100] and 40 <= budgets[2] <= 100
    assert sorted(w for step in range(5) for w in job.order(step)) == list(range(5))
    assert len({v[3].budget for v in map(job.draw_views, range(40))}) > 10


def test_lambda_weighs_the_sparse_branch(tmp_path):
    """λ = 0 must give the full branch alone, and the loss must be linear in λ."""

    def loss(sparse_weight):
        recipe = replace(SMALL, loss=replace(SMALL.loss, sparse_weight=sparse_weight))
        job = Distillation(recipe, tmp_path / str(sparse_weight), Watcher())
        ids = torch.arange(192) * 7 % 4096
        return job, float(job.loss(ids, 0, job.draw_views(0), 1)), float(job.loss(ids, 0, [None], 1))

    (_, zero, full), (_, one, _), (_, three, _) = map(loss, (0.0, 1.0, 3.0))
    assert zero == pytest.approx(full, rel=1e-5)
    assert three - zero == pytest.approx(3 * (one - zero), rel=1e-4) and one > zero


def test_steps_without_a_finite_gradient_are_counted_and_end_the_run():
    model = tiny_model(layers=1)
    trainer = Trainer(model, Optimizer(steps=50))
    before = [t.detach().clone() for t in trainer.parameters]
    broken = lambda: sum(t.sum() for t in trainer.parameters) * float("nan")  # noqa: E731
    assert trainer.step([broken]) != trainer.step([broken])
    assert trainer.progress.skipped == 2 and trainer.progress.step == 2
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    trainer.step([lambda: sum(t.square().sum() for t in trainer.parameters)])
    assert trainer.progress.skipped_in_a_row == 0
    with pytest.raises(NonFiniteError, match="10 steps in a row"):
        for _ in range(10):
            trainer.step([broken])


def test_micro_batches_sum_to_the_whole_gradient():
    def part(trainer, rows, share):
        model = trainer_model[id(trainer)]
        return lambda: F.cross_entropy(model.embedding[rows] @ model.head.T, rows) * len(rows) / share

    models = [tiny_model(layers=1, seed=2) for _ in range(2)]
    twins = [Trainer(model, Optimizer(clip=1e9)) for model in models]
    trainer_model = {id(t): m for t, m in zip(twins, models)}
    rows = torch.arange(12)
    twins[0].step([part(twins[0], rows, 12)])
    twins[1].step([part(twins[1], rows[:5], 12), part(twins[1], rows[5:], 12)])
    assert torch.allclose(models[0].embedding, models[1].embedding, atol=1e-6)


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
    from bdcli.store import Store

    assert len(Store().evaluations(result["run_id"])) == 2 * 2
    curve = cli("report", "--run", result["run_id"], "--plot", tmp_path / "curve.svg")
    assert curve.code == 0 and "step 2" in curve.out and (tmp_path / "curve.svg").stat().st_size > 5000
    assert len(cli("report", "--run", result["run_id"], "--format", "json").json["evaluations"]) == 4
    assert cli("report", "--run", "nope").code == 2
    prompt = tmp_path / "p.txt"
    cli("prompt", "--ctx", 128, "--out", prompt)
    decoded = cli("decode", prompt, "--drafter", result["checkpoint"], "--max-new-tokens", 8, "--json").json
    assert decoded["drafted"] > 0
    again = cli("distill", path, "--out", tmp_path / "run")
    assert again.code == 2 and "--resume" in again.err
    bad = cli("distill", path, "--set", "optimizer.stepz=3", "--out", tmp_path / "x")
    assert bad.code == 2 and "did you mean optimizer.steps?" in bad.err and not (tmp_path / "x").exists()
