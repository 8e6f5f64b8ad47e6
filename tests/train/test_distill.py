"""Distilling: training sees what decoding sees, the grid is what decoding does, and a run survives being stopped."""

import itertools
import json
import math
import random
from dataclasses import replace

import pytest
import safetensors.numpy
import torch
import torch.nn.functional as F
from datasets import Dataset

from bdcli.base.errors import BdcliError, NonFiniteError, UserError
from bdcli.cache.budget import BudgetCache
from bdcli.cache.full import FullCache
from bdcli.cache.kinds import TORCH_CACHES
from bdcli.cache.selection import CacheSize, Full, Window, parse_selection
from bdcli.cache.view import FULL, View
from bdcli.config.distill import Data, DistillRecipe, Evaluation, Optimizer, Views
from bdcli.data.prompts import HELD_OUT
from bdcli.data.sources import Documents, documents, held_out_prompts
from bdcli.model.checkpoint import POCKET, load_model, save_model
from bdcli.model.rope import RopeTable
from bdcli.results.metrics import RoundFigures, looped_tokens, mark_loops
from bdcli.speculation.draft_length import FixedGamma
from bdcli.speculation.drafter import ModelDrafter
from bdcli.speculation.runner import Runner
from bdcli.speculation.sampling import Sampling
from bdcli.speculation.speculator import Speculator
from bdcli.train.acceptance import (
    Cell,
    Passage,
    accept_probabilities,
    acceptance_cell,
    replay,
    text_probs,
)
from bdcli.train.distill.checks import missing
from bdcli.train.distill.material import bytes_per_token
from bdcli.train.distill.plan import draw_selections
from bdcli.train.distill.run import Distillation, Watcher
from bdcli.train.forward import anchored_hidden, final_rows, view_hidden
from bdcli.train.losses import HiddenTarget
from bdcli.train.trainer import Trainer
from tests.support.models import tiny_model


def cache_of(model, selection, prompt, total):
    """The cache that decoding gives a drafter: for `prompt` tokens read before the first round, `total` in all."""
    return selection.cache(TORCH_CACHES, model, CacheSize(prompt, total, total))


def decode_logits(model, ids, view):
    """Logits of every position as the decode caches give them, one token a forward."""
    cache = FullCache(model, len(ids)) if view is FULL else BudgetCache(model, len(ids), view)
    return torch.cat([model.forward([token], cache, 1) for token in ids])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("rebased", "widest"), [(True, 512), (False, 512), (True, 6), (False, 13)])
def test_training_views_equal_decoding(rebased, widest, kv_heads, monkeypatch):
    monkeypatch.setattr("bdcli.train.forward.MIN_BLOCK", 5)
    monkeypatch.setattr("bdcli.train.forward.MAX_BLOCK", widest)
    rng = random.Random(kv_heads)
    model = tiny_model(layers=2, kv_heads=kv_heads, seed=rng.randrange(99))
    ids = [rng.randrange(41) for _ in range(131)]
    views = [FULL, View(24, 4, 0, 5, rebased), View(60, 1, 0, 3, rebased), View(400, 4, 0, 8, rebased)]
    table = RopeTable(model.config.rope, len(ids), len(ids), torch.float32, "cpu")
    hidden = view_hidden(model, table, torch.tensor(ids), views)
    for view, x in zip(views, hidden):
        want = decode_logits(model, ids, view)
        assert (model.logits(x) - want).abs().max() < 2e-4 * want.abs().max()
    apart = [(hidden[0] - x).abs().max() for x in hidden[1:3]]
    assert min(apart) > 1e-2, "the views would be the same even if the budget were ignored"


def anchored_case(select, positions, budget, kv_heads, start):
    model = tiny_model(layers=2, kv_heads=kv_heads, seed=budget)
    ids = random.Random(budget).choices(range(41), k=start + 30)
    table = RopeTable(model.config.rope, len(ids), len(ids), torch.float32, "cpu")
    return model, ids, table, parse_selection(budget, select, positions, 5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("budget", [40, 64, 104])
@pytest.mark.parametrize(
    ("select", "positions"), [("chunk", "rebased"), ("chunk", "absolute"), ("official", "absolute")]
)
def test_chosen_chunks_in_training_equal_decoding(select, positions, budget, kv_heads):
    start = 150
    model, ids, table, selection = anchored_case(select, positions, budget, kv_heads, start)
    cache = cache_of(model, selection, start, len(ids))
    model.prefill(ids[:start], cache)
    want = torch.cat([model.forward([token], cache, 1) for token in ids[start:]])
    got = model.logits(anchored_hidden(model, table, torch.tensor(ids), start, selection.view(start)))
    assert (got - want).abs().max() < 2e-4 * want.abs().max()
    full = model.logits(view_hidden(model, table, torch.tensor(ids), [FULL])[0, start:])
    assert (got - full).abs().max() > 1e-2, "the view would be the same even if the budget were ignored"


def test_what_the_prefix_learns():
    """none: only what comes after the prefix learns; selected: kept keys too, one layer deep; full: all of it."""
    grads = {}
    for mode in ("none", "selected", "full"):
        model, ids, table, selection = anchored_case("chunk", "rebased", 64, 2, 150)
        ids = torch.arange(180)
        model.embedding = torch.randn(180, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
        anchored_hidden(model, table, ids, 150, selection.view(150), mode).square().sum().backward()
        grads[mode] = model.embedding.grad
    assert not grads["none"][:150].any() and grads["none"][150:].any()
    assert not grads["selected"][:150].any() and grads["full"][:150].any()
    model, ids, table, selection = anchored_case("chunk", "rebased", 64, 2, 150)
    learned = {}
    for mode in ("none", "selected"):
        model.layers[1].qkv = model.layers[1].qkv.detach().requires_grad_()
        anchored_hidden(model, table, torch.tensor(ids), 150, selection.view(150), mode).square().sum().backward()
        learned[mode] = model.layers[1].qkv.grad
    assert (learned["none"] - learned["selected"]).abs().max() > 1e-3


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
    selection = parse_selection(budget, gamma=gamma)
    reader = ModelDrafter(Runner(drafter, cache_of(drafter, selection, len(prompt) - 1, 400)))
    engine = Speculator(Runner(target, FullCache(target, 400)), reader, Sampling(), 0)
    engine.prefill(prompt)
    steps = list(engine.rounds(new, frozenset(), FixedGamma(gamma)))
    passage = Passage("x", tuple(prompt), tuple(engine.new_tokens), new)
    found = accept_probabilities(drafter, passage, selection)
    looped = looped_tokens(prompt, engine.new_tokens)
    played = replay(found, gamma, new, looped)
    assert (played.drafted, played.accepted, played.rounds) == (
        sum(s.drafted for s in steps),
        sum(s.accepted for s in steps),
        len(steps),
    )
    told = [RoundFigures(len(s.tokens), s.drafted, s.accepted, 1.0) for s in steps]
    clean = [r for r in mark_loops(prompt, engine.new_tokens, told) if not r.looped]
    assert (played.clean_drafted, played.clean_accepted) == (
        sum(r.drafted for r in clean),
        sum(r.accepted for r in clean),
    )
    assert 0 < played.accepted < played.drafted


def test_replay_by_hand():
    played = replay([1, 1, 0, 1, 0, 1], gamma=2, limit=6, looped=[False] * 3 + [True] * 3)
    # rounds: TT + one more (at 2), T + recovered (at 4), the last token alone
    assert (played.rounds, played.drafted, played.accepted) == (3, 2 + 2 + 0, 2 + 1)
    assert (played.clean_drafted, played.clean_accepted) == (2, 2)


@pytest.mark.parametrize("gamma", [1, 3])
def test_expected_counts_are_the_mean_over_outcomes(gamma):
    """Chances c: the replay must give the average over all 2^n outcomes, each weighted by its probability."""
    odds, limit = [0.9, 0.2, 0.5, 0.7, 0.0, 1.0, 0.4], 9
    mean = dict.fromkeys(("rounds", "drafted", "accepted"), 0.0)
    for outcome in itertools.product((0, 1), repeat=len(odds)):
        weight = math.prod(c if o else 1 - c for c, o in zip(odds, outcome))
        played = replay(outcome, gamma, limit)
        for name in mean:
            mean[name] += weight * getattr(played, name)
    expected = replay(odds, gamma, limit)
    assert {name: getattr(expected, name) for name in mean} == pytest.approx(mean)


@pytest.mark.parametrize("budget", [None, 64])
def test_the_sampled_grid_is_what_sampling_does(budget):
    """Acceptance of many sampled decodings lies around what replaying their own texts expects."""
    target, drafter, limit, warm = (
        tiny_model(seed=1, spread=0.2),
        tiny_model(layers=1, seed=2, spread=0.2),
        24,
        Sampling(0.9),
    )
    prompt, selection = [i * 7 % 41 for i in range(90)], parse_selection(budget, gamma=3)
    drafted = accepted = expected = squares = 0.0
    for seed in range(150):
        reader = ModelDrafter(Runner(drafter, cache_of(drafter, selection, len(prompt) - 1, 130)))
        engine = Speculator(Runner(target, FullCache(target, 130)), reader, warm, seed)
        engine.prefill(prompt)
        steps = list(engine.rounds(limit, frozenset(), FixedGamma(3)))
        text = engine.new_tokens
        passage = Passage("x", tuple(prompt), tuple(text), limit, tuple(text_probs(target, prompt, text, warm)))
        played = replay(accept_probabilities(drafter, passage, selection, warm), 3, limit)
        drafted, accepted = drafted + sum(s.drafted for s in steps), accepted + sum(s.accepted for s in steps)
        gap = sum(s.accepted for s in steps) - played.accepted
        expected, squares = expected + played.accepted, squares + gap * gap
    assert abs(accepted - expected) < 3.5 * squares**0.5 and 0.1 < accepted / drafted < 0.9


def test_interval_covers_the_rate(pocket, text_ids):
    passages = [
        Passage("x", tuple(text_ids[s : s + 100]), tuple(text_ids[s + 100 : s + 140]), 40) for s in range(0, 5000, 900)
    ]
    cell = acceptance_cell(pocket[1], passages, Window(64, gamma=3), 3)
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
    source = Documents(["stdlib"])
    windows = list(itertools.islice(source.windows(tokenizer, 512, seed=3), 5))
    assert [len(w.ids) for w in windows] == [512] * 5 and not any(w.asked for w in windows)
    assert windows[0] != next(source.windows(tokenizer, 512, seed=4))
    read, kept, dropped, failed = source.accounts
    assert read == kept + sum(dropped.values()) + failed and dropped["held out"] == 1


def test_sources_from_files(tmp_path, pocket):
    (tmp_path / "a.txt").write_text("word " * 4000, "utf-8")
    rows = [{"text": f"row {i} " * 900} for i in range(40)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    docs = list(documents(str(tmp_path)))
    assert len(docs) == 41 and 0 < sum(d.held_out for d in docs) < 12
    prompts = held_out_prompts(pocket[2], [str(tmp_path / "b.jsonl")], 200, 3)
    assert [len(ids) for _, ids in prompts] == [200] * 3 and prompts[0][0] == "b"
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
    precision="float32",
    evaluation=Evaluation(every=3, contexts=(64, 128), budgets=(40, 100, "full"), passages=3, new_tokens=24),
)


def weights_of(folder):
    return load_model(folder, torch.float32, torch.device("cpu")).tensors()


def adds_up(a):
    return a["read"] == a["kept"] + sum(a["dropped"].values()) + a["failed"] > 0


def test_a_run_measures_before_and_after_and_writes_a_drafter(tmp_path):
    grids = []
    job = Distillation(SMALL, tmp_path / "run", Watcher(grid=lambda step, cells: grids.append((step, cells))))
    assert any("supervised positions" in line for line in job.plan.lines())
    outcome = job.run(resume=False)
    assert outcome.status == "done" and outcome.steps == 6 and outcome.skipped == 0
    assert [step for step, _ in grids] == [0, 3, 6]
    assert {(c.context, c.budget) for c in outcome.before} == {(c, b) for c in (64, 128) for b in (40, 100, "full")}
    assert outcome.windows["kept"] == 5 and adds_up(outcome.windows) and adds_up(outcome.documents)
    changed = zip(weights_of(outcome.initial), job.drafter.tensors(), strict=True)
    assert not all(torch.equal(a, b) for a, b in changed)
    assert outcome.positions_per_target_token == 4
    saved = json.loads((tmp_path / "run" / "data" / "passages.json").read_text("utf-8"))["passages"]
    assert all(0 <= p["loop_rate"] <= 1 for p in saved) and any(p["loop_rate"] for p in saved)
    with pytest.raises(UserError, match="holds an earlier run"):
        Distillation(SMALL, tmp_path / "run", Watcher()).run(resume=False)


def test_without_a_drafter_the_targets_first_layers_are_the_start(tmp_path):
    recipe = replace(SMALL, drafter=None, layers=1, optimizer=replace(SMALL.optimizer, steps=2))
    job = Distillation(recipe, tmp_path / "run", Watcher())
    assert any("drafter of its first 1 layers" in line for line in job.plan.lines()) and len(job.drafter.layers) == 1
    target = load_model(POCKET / "target", torch.float32, torch.device("cpu"))
    assert torch.equal(job.drafter.layers[0].qkv, target.layers[0].qkv)
    assert [p for _, p in missing(recipe, tmp_path / "run", tmp_path / "run" / "data")] == []
    done = job.run(resume=False)
    assert torch.equal(weights_of(done.initial)[0], target.embedding) and done.steps == 2
    again = Distillation(recipe, tmp_path / "run", Watcher()).run(resume=True)  # from the same start
    assert again.steps == 2 and again.after == done.after
    Distillation(replace(recipe, layers=3), tmp_path / "tried", Watcher())  # as a dry run does
    assert len(Distillation(recipe, tmp_path / "tried", Watcher()).drafter.layers) == 1
    other = replace(recipe, target=str(POCKET / "drafter"))
    assert "target" in [key for key, _ in missing(other, tmp_path / "run", tmp_path / "run" / "data")]


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
    assert outcome.windows["kept"] == 5, "windows need no target: those that it was to write keep the corpus text"
    manifest = json.loads((tmp_path / "run" / "data" / "manifest.json").read_text())
    assert sum(shard["late"] for shard in manifest["shards"]) > 0


def test_a_drafter_is_judged_outside_loops(tmp_path, monkeypatch):
    """A text that repeats itself is guessed by any drafter: what only gains there is not kept."""
    measured = iter([(0.2, 0.3), (0.9, 0.29), (0.1, 0.31), (0.3, None)])

    def grid(*_):
        rate, clean = next(measured)
        yield Cell("x", 64, 40, 5, rate, clean, None, None, 2.0, 3)

    monkeypatch.setattr("bdcli.train.distill.run.acceptance_grid", grid)
    short = replace(SMALL, optimizer=replace(SMALL.optimizer, steps=6), evaluation=replace(SMALL.evaluation, every=2))
    outcome = Distillation(short, tmp_path / "run", Watcher()).run(resume=False)
    assert outcome.best_step == 4 and next(measured, None) is None


def test_training_stops_when_acceptance_does_not_get_better_and_keeps_the_best(tmp_path):
    """A rate of nearly nothing never betters the first grid: two more are measured, then it ends."""
    still = replace(
        SMALL,
        optimizer=replace(SMALL.optimizer, lr=1e-12, steps=30),
        evaluation=replace(SMALL.evaluation, every=2, patience=2),
    )
    job = Distillation(still, tmp_path / "run", Watcher())
    assert any("stops after 2 measurements" in line for line in job.plan.lines())
    outcome = job.run(resume=False)
    assert (outcome.status, outcome.stopped, outcome.steps) == ("done", "no better for 2 measurements", 4)
    assert outcome.best_step == 0 and outcome.after == outcome.before
    kept, initial = weights_of(outcome.checkpoint), weights_of(outcome.initial)
    assert all(torch.equal(a, b) for a, b in zip(kept, initial, strict=True))
    again = Distillation(still, tmp_path / "run", Watcher()).run(resume=True)
    assert again.steps == 4 and again.stopped == outcome.stopped


def test_damaged_and_foreign_states_are_refused_and_kept(tmp_path):
    Distillation(SMALL, tmp_path / "run", Watcher(), deadline=0.0).run(resume=False)
    state = tmp_path / "run" / "state.pt"
    other = replace(SMALL, optimizer=replace(SMALL.optimizer, lr=1e-5))  # the material fits, the state does not
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
        selections = draw_selections(job.recipe, step)
        assert selections == draw_selections(twin.recipe, step) and job.order(step, 5) == twin.order(step, 5)
        budgets = [s.budget for s in selections[1:]]
        assert budgets[:2] == [40, 100] and 40 <= budgets[2] <= 100
    assert sorted(w for step in range(5) for w in job.order(step, 5)) == list(range(5))
    assert len({v[3].budget for v in (draw_selections(job.recipe, n) for n in range(40))}) > 10


def test_lambda_weighs_the_sparse_branch(tmp_path):
    """λ = 0 must give the full branch alone, and the loss must be linear in λ."""

    def loss(sparse_weight):
        recipe = replace(SMALL, loss=replace(SMALL.loss, sparse_weight=sparse_weight))
        job = Distillation(recipe, tmp_path / str(sparse_weight), Watcher())
        ids = torch.arange(192) * 7 % 4096
        target = HiddenTarget(final_rows(job.target, ids).detach(), job.target.head)
        return job, float(job.loss(ids, target, job.plan.selections, 1)), float(job.loss(ids, target, [Full()], 1))

    (_, zero, full), (_, one, _), (_, three, _) = map(loss, (0.0, 1.0, 3.0))
    assert zero == pytest.approx(full, rel=1e-5)
    assert three - zero == pytest.approx(3 * (one - zero), rel=1e-4) and one > zero


@pytest.mark.parametrize("select", ["chunk", "official"])
@pytest.mark.parametrize("teach", ["all", "anchored"])
def test_views_with_chosen_chunks_teach_what_follows_the_anchors(tmp_path, select, teach):
    """The loss is made of exactly the rows that follow an anchor, as decoding with the chosen view has them."""
    views = Views(
        budgets=(64, 104), select=select, positions="absolute", anchors=(120, 160), anchor_tokens=20, teach=teach
    )
    job = Distillation(replace(SMALL, views=views), tmp_path, Watcher())
    ids = torch.arange(192) * 11 % 4096
    target = HiddenTarget(final_rows(job.target, ids).detach(), job.target.head)
    got = float(job.loss(ids, target, [Full(), parse_selection(64, select, "absolute")], 1))

    def mean(start, stop, budget, first):
        cache = cache_of(job.drafter, parse_selection(budget, select, "absolute"), first - 1, 192)
        job.drafter.prefill(ids[: first - 1].tolist(), cache)
        rows = torch.cat([job.drafter.forward([t], cache, 1) for t in ids[first - 1 : stop].tolist()])[
            start - first + 1 :
        ]
        p = F.linear(target.hidden[start:stop], target.head).softmax(-1)
        return float(F.kl_div(rows.log_softmax(-1), p, reduction="none").sum(-1).mean())

    spans = [(119, 139), (159, 179)]
    full = sum(mean(a, b, None, 1) for a, b in spans) / 2 if teach == "anchored" else mean(0, 192, None, 1)
    sparse = sum(mean(a, b, 64, a + 1) for a, b in spans) / 2
    assert got == pytest.approx(full + SMALL.loss.sparse_weight * sparse, rel=1e-4)


def test_accepted_length_weights_change_the_loss_and_keep_its_scale(tmp_path):
    ids = torch.arange(192) * 11 % 4096
    losses = {}
    for weights in ("uniform", "accepted_length"):
        job = Distillation(replace(SMALL, loss=replace(SMALL.loss, weights=weights)), tmp_path, Watcher())
        target = HiddenTarget(final_rows(job.target, ids).detach(), job.target.head)
        losses[weights] = float(job.loss(ids, target, [Full()], 1))
    assert losses["uniform"] != pytest.approx(losses["accepted_length"], rel=1e-3)
    assert losses["accepted_length"] < losses["uniform"], "accepted positions weigh more and have the smaller loss"


# -- prepared material


def files_of(folder):
    return {p.name: p.read_bytes() for p in sorted((folder / "data").iterdir()) if p.suffix != ".new"}


def test_preparing_goes_on_at_the_missing_shard(tmp_path):
    recipe = replace(
        SMALL, data=replace(SMALL.data, shard_windows=2, cache="argmax"), loss=replace(SMALL.loss, kind="ce")
    )
    whole = Distillation(recipe, tmp_path / "whole", Watcher()).material().windows()
    assert whole.shards == 3 and len(whole) == 5 and adds_up(vars(whole.accounts)) and adds_up(vars(whole.documents))

    class Stop(Exception):
        pass

    def raise_at(_phase, done, _total, _note):
        if done == 4:
            raise Stop

    with pytest.raises(Stop):
        Distillation(recipe, tmp_path / "stopped", Watcher(progress=raise_at)).material().windows()
    (tmp_path / "stopped" / "data" / "windows-00001.safetensors.1.new").write_bytes(b"half")  # as after kill -9
    assert len(json.loads((tmp_path / "stopped" / "data" / "manifest.json").read_text())["shards"]) == 1
    again = Distillation(recipe, tmp_path / "stopped", Watcher()).material().windows()
    assert again.accounts == whole.accounts and files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")
    shard = tmp_path / "whole" / "data" / "windows-00001.safetensors"
    table = Dataset.from_dict(safetensors.numpy.load_file(shard))  # how `datasets` reads a shard
    assert set(table.column_names) == {"ids", "written", "late", "loop_rate", "argmax"} and len(table) == 2
    assert table[1]["ids"] == whole.ids(3).tolist()
    torn = shard.read_bytes()[:-7]
    shard.write_bytes(torn)
    with pytest.raises(UserError, match=r"windows-00001\.safetensors is damaged"):
        Distillation(recipe, tmp_path / "whole", Watcher()).material().windows()
    assert shard.read_bytes() == torn


def test_cached_answers_teach_what_the_target_would(tmp_path):
    losses = {}
    for cache in ("none", "hidden", "topk"):
        data = replace(SMALL.data, cache=cache, top_k=512, written=0)
        job = Distillation(replace(SMALL, data=data), tmp_path / cache, Watcher())
        windows = job.material().windows()
        assert windows.bytes >= bytes_per_token(job.recipe, 256) * 5 * 192
        losses[cache] = [float(job.window_loss(windows, w, job.plan.selections, 1)) for w in range(3)]
    assert losses["hidden"] == pytest.approx(losses["none"], rel=2e-2)
    assert losses["topk"] == pytest.approx(losses["none"], rel=5e-2)


def test_material_of_another_target_is_refused(tmp_path):
    Distillation(SMALL, tmp_path / "run", Watcher()).material().windows()
    save_model(Distillation(SMALL, tmp_path / "x", Watcher()).drafter, POCKET / "drafter", tmp_path / "other")
    with pytest.raises(UserError, match="made for another target"):
        Distillation(replace(SMALL, target=str(tmp_path / "other")), tmp_path / "run", Watcher()).material().windows()
    with pytest.raises(UserError, match="made for another data"):
        other = replace(SMALL, data=replace(SMALL.data, windows=4))
        Distillation(other, tmp_path / "run", Watcher()).material().windows()
    (tmp_path / "run" / "data" / "manifest.json").write_text('{"parts": ')
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Distillation(SMALL, tmp_path / "run", Watcher()).material().windows()


def test_windows_the_target_loops_in_are_dropped_and_counted(tmp_path):
    recipe = replace(SMALL, data=replace(SMALL.data, written=1.0, max_loop_rate=0.0, windows=3))
    windows = Distillation(recipe, tmp_path, Watcher()).material().windows()
    assert len(windows) == 3 and windows.accounts.dropped["loops"] > 0 and adds_up(vars(windows.accounts))
    assert bool(windows._row(0)["written"]) and float(windows._row(0)["loop_rate"]) == 0
    looped = [rate for rate in windows.loop_rates if rate > 0]  # dropped texts are on record too
    assert len(looped) == windows.accounts.dropped["loops"] and windows.loop_rates.count(0) >= 3


def test_files_that_are_not_text_are_counted(tmp_path):
    (tmp_path / "good.txt").write_text("word " * 50)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    read, kept, dropped, failed = Documents([str(tmp_path)]).accounts
    assert (read, failed) == (3, 1) and read == kept + sum(dropped.values()) + failed
    with pytest.raises(UserError, match="bad is not UTF-8"):
        list(documents(str(tmp_path)))


def test_steps_without_a_finite_gradient_are_counted_and_end_the_run():
    model = tiny_model(layers=1)
    trainer = Trainer(model, Optimizer(steps=50))
    before = [t.detach().clone() for t in trainer.parameters]
    broken = lambda: sum(t.sum() for t in trainer.parameters) * float("nan")  # noqa: E731
    assert trainer.step(lambda _: [broken]) != trainer.step(lambda _: [broken])
    assert trainer.progress.skipped == 2 and trainer.progress.step == 2
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    trainer.step(lambda _: [lambda: sum(t.square().sum() for t in trainer.parameters)])
    assert trainer.progress.skipped_in_a_row == 0
    with pytest.raises(NonFiniteError, match="10 steps in a row"):
        for _ in range(10):
            trainer.step(lambda _: [broken])


def test_micro_batches_sum_to_the_whole_gradient():
    def part(trainer, rows, share):
        model = trainer_model[id(trainer)]
        return lambda: F.cross_entropy(model.embedding[rows] @ model.head.T, rows) * len(rows) / share

    models = [tiny_model(layers=1, seed=2) for _ in range(2)]
    twins = [Trainer(model, Optimizer(clip=1e9)) for model in models]
    trainer_model = {id(t): m for t, m in zip(twins, models)}
    rows = torch.arange(12)
    twins[0].step(lambda _: [part(twins[0], rows, 12)])
    twins[1].step(lambda _: [part(twins[1], rows[:5], 12), part(twins[1], rows[5:], 12)])
    assert torch.allclose(models[0].embedding, models[1].embedding, atol=1e-6)


def test_a_step_that_does_not_fit_is_cut_and_gives_the_same_weights(tmp_path, monkeypatch):
    whole, cut = (Distillation(SMALL, tmp_path / name, Watcher()) for name in ("whole", "cut"))
    real = cut.window_loss

    def small_memory(windows, window, selections, *rest):
        if len(selections) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(windows, window, selections, *rest)

    monkeypatch.setattr(cut, "window_loss", small_memory)
    trainers = []
    for job in (whole, cut):
        windows, trainer = job.material().windows(), Trainer(job.drafter, SMALL.optimizer)
        for step in range(3):
            trainer.step(lambda pieces, step=step, job=job, windows=windows: job.parts(windows, step, pieces), 1.0)
        trainers.append(trainer)
    assert [(t.progress.out_of_memory, t.progress.pieces) for t in trainers] == [(0, 1), (2, 4)]
    assert all(torch.allclose(a, b, atol=2e-4) for a, b in zip(whole.drafter.tensors(), cut.drafter.tensors()))

    def nothing_fits(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(cut, "window_loss", nothing_fits)
    with pytest.raises(BdcliError, match="does not fit into memory"):
        trainers[1].step(lambda pieces: cut.parts(windows, 0, pieces))


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
