"""Pretraining: the model learns what it reads, and a stopped run ends as an undisturbed one."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bdcli.base.errors import UserError
from bdcli.cache.full import FullCache
from bdcli.config.pretrain import Corpus as Mix
from bdcli.config.pretrain import Schedule
from bdcli.model.checkpoint import load_model
from bdcli.model.hub import POCKET
from bdcli.model.tokenizer import load_tokenizer
from bdcli.train.pretrain.batches import next_token_loss
from bdcli.train.pretrain.run import Pretraining
from bdcli.train.pretrain.stages import share_done, skip_positions, stage_context
from tests.support.models import tiny_model
from tests.support.training import Figures, same_weights, small_pretrain, weights_of, write_texts


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of small texts."""
    return write_texts(tmp_path_factory.mktemp("texts"))


def test_a_model_from_nothing_learns_and_transformers_reads_it(tmp_path, text):
    from transformers import AutoModelForCausalLM

    figures = Figures()
    job = Pretraining(small_pretrain(text), tmp_path / "run", figures)
    assert any("from nothing" in line for line in job.plan())
    done = job.run(resume=False)
    assert (done.status, done.steps, done.tokens, done.skipped) == ("done", 16, 8192, 0)
    places = [(at["step"], at["tokens"]) for at, _ in figures.found]
    assert places == [(0, 0), (6, 3072), (12, 6144), (16, 8192)]
    before, after = done.before[0], done.after[0]
    assert before.nll == pytest.approx(math.log(300), rel=0.05)
    assert after.nll < before.nll - 0.5
    ids = torch.arange(2, 60)[None]
    theirs = AutoModelForCausalLM.from_pretrained(done.checkpoint, dtype=torch.float32)(ids).logits[0]
    ours = load_model(done.checkpoint, torch.float32, torch.device("cpu"))
    assert torch.allclose(ours.forward(ids[0].tolist(), FullCache(ours, 60), 58), theirs, atol=1e-3)
    assert (
        load_tokenizer(done.checkpoint).decode(load_tokenizer(done.checkpoint)("The blue ring")["input_ids"])
        == "The blue ring"
    )
    with pytest.raises(UserError, match="--resume"):
        job.run(resume=False)


def test_stopping_and_resuming_gives_the_same_weights(tmp_path, text):
    whole = Pretraining(small_pretrain(text), tmp_path / "whole").run(resume=False)
    job = Pretraining(small_pretrain(text), tmp_path / "parts", minutes=0)
    first = job.run(resume=False)
    assert first.stopped == "out of time" and 0 < first.steps < 4
    rest = Pretraining(small_pretrain(text), tmp_path / "parts").run(resume=True)
    assert rest.steps == whole.steps and rest.after == whole.after
    assert same_weights(whole.checkpoint, rest.checkpoint)
    other = small_pretrain(text, seed=1)
    with pytest.raises(UserError, match="another recipe"):
        Pretraining(other, tmp_path / "parts").run(resume=True)
    (tmp_path / "parts" / "state.pt").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"state\.pt is damaged"):
        Pretraining(small_pretrain(text), tmp_path / "parts").run(resume=True)
    assert (tmp_path / "parts" / "state.pt").read_bytes() == b"torn"


def test_going_on_from_a_checkpoint_keeps_its_tokenizer(tmp_path, text):
    schedule = Schedule(tokens=512, contexts=(512,), shares=(1.0,), tokens_per_step=512)
    job = Pretraining(small_pretrain(text, init=str(POCKET / "drafter"), schedule=schedule), tmp_path / "run")
    done = job.run(resume=False)
    assert (done.checkpoint / "tokenizer.json").read_bytes() == (POCKET / "drafter" / "tokenizer.json").read_bytes()
    assert done.before[0].nll < 9


def test_the_first_layers_of_a_model_are_a_start(tmp_path, text):
    first = Pretraining(small_pretrain(text), tmp_path / "a").run(False)
    job = Pretraining(small_pretrain(text, init=str(first.checkpoint), layers=1), tmp_path / "b")
    assert job.shape.layers == 1
    done = job.run(False)
    assert load_model(done.checkpoint, torch.float32, torch.device("cpu")).config.layers == 1
    assert torch.equal(weights_of(tmp_path / "b" / "start")[0], weights_of(first.checkpoint)[0])
    assert done.after[0].nll < done.before[0].nll
    assert [key for key, _ in small_pretrain(text, layers=1).problems()] == ["layers"]


def test_loss_is_the_mean_over_following_tokens_whatever_the_micro_batches():
    model, windows = tiny_model(vocab=300), torch.randint(0, 300, (4, 50))
    parts = sum(float(next_token_loss(model, w, 4)) for w in windows.split(1))
    logits = torch.stack([model.forward(w.tolist(), FullCache(model, 50), 50) for w in windows])
    want = F.cross_entropy(logits[:, :-1].reshape(-1, 300), windows[:, 1:].reshape(-1))
    assert parts == pytest.approx(float(want), rel=1e-4)
    assert float(next_token_loss(model, windows, 4)) == pytest.approx(parts, rel=1e-5)


def test_a_guided_run_goes_on_after_a_stop_and_wants_two_layers(tmp_path, text):
    guided = small_pretrain(text, corpus=Mix((str(text),), copies=0.5, guide=0.5))
    whole = Pretraining(guided, tmp_path / "whole").run(False)
    Pretraining(guided, tmp_path / "parts", minutes=0).run(False)
    rest = Pretraining(guided, tmp_path / "parts").run(True)
    assert same_weights(whole.checkpoint, rest.checkpoint)
    plain = Pretraining(replace(guided, corpus=replace(guided.corpus, guide=0.0)), tmp_path / "plain").run(False)
    assert not torch.equal(weights_of(plain.checkpoint)[0], weights_of(whole.checkpoint)[0])
    with pytest.raises(UserError, match="two layers"):
        Pretraining(replace(guided, shape=replace(guided.shape, layers=1)), tmp_path / "one")
    assert [k for k, _ in replace(guided, corpus=Mix(guide=0.5)).problems()] == ["corpus.guide"]


def test_the_rate_follows_the_clock_where_the_recipe_says_so(tmp_path, text):
    timed = small_pretrain(text, schedule=replace(small_pretrain(text).schedule, follow="time"))
    with pytest.raises(UserError, match="--max-minutes"):
        Pretraining(timed, tmp_path / "x")
    assert Pretraining(timed, tmp_path / "x", minutes=1).limit_s == 60
    assert share_done(timed.schedule, 0, 30, 60) == 0.5 and share_done(timed.schedule, 8192, 30, 60) == 1
    assert share_done(small_pretrain(text).schedule, 0, 30, 60) == 0
    assert [stage_context(timed.schedule, s) for s in (0, 0.49, 0.51, 1.0)] == [128, 128, 512, 512]


def test_skips_spread_short_windows_over_the_reach():
    made = [skip_positions(64, 1000, 3, step) for step in range(400)]
    gaps = [int(p[-1]) - 63 for p in made]
    assert all(p[0] == 0 and p.diff().min() == 1 and (p.diff() > 1).sum() <= 1 and p[-1] < 1000 for p in made)
    assert 140 < gaps.count(0) < 260 and max(gaps) > 800 and sum(0 < gap < 30 for gap in gaps) > 60
    assert torch.equal(skip_positions(64, 1000, 3, 7), made[7]) and skip_positions(64, 0, 3, 7).equal(torch.arange(64))


def test_the_command(tmp_path, cli, text):
    path = tmp_path / "r.yaml"
    path.write_text(
        f"corpus: {{sources: ['{text}']}}\n"
        "shape: {layers: 1, hidden_size: 32, intermediate_size: 48, vocab_size: 300}\n"
        "schedule: {tokens: 2048, contexts: [512], shares: [1], tokens_per_step: 1024}\nheld_out: {contexts: [512]}\n"
        "precision: float32\n"
    )
    assert cli("pretrain", path, "--dry-run").code == 0
    done = cli("pretrain", path, "--out", tmp_path / "run", "--set", f"held_out.sources=['{text}']", "--json")
    assert done.code == 0 and done.json["tokens"] == 2048
    row = cli("report", "--format", "json", "--command", "pretrain").json["runs"][0]
    assert row["run_id"] == done.json["run_id"] and row["status"] == "done"
    from bdcli.results.store import Store

    assert [x.step for x in Store().losses(row["run_id"])] == [0, 2]
    shown = cli("report", "--run", row["run_id"])
    assert shown.code == 0 and "long context is worth" in shown.out and len(shown.out.splitlines()) == 3
    assert len(cli("report", "--run", row["run_id"], "--format", "json").json["losses"]) == 2
    bad = cli(
        "pretrain", path, "--set", "schedule.tokenz=3", "--set", "optimizer.lr=-1", "--set", "corpus.weights=[1, 2]"
    )
    assert bad.code == 2 and "did you mean schedule.tokens?" in bad.err
    many = cli(
        "pretrain",
        path,
        "--set",
        "optimizer.lr=-1",
        "--set",
        "corpus.weights=[1, 2]",
        "--set",
        "schedule.contexts=[3]",
        "--set",
        "corpus.copies=1",
    )
    named = ("optimizer.lr", "corpus.weights", "corpus.copies", "schedule.contexts")
    assert many.code == 2 and all(key in many.err for key in named)
    gone = cli("pretrain", path, "--set", "corpus.sources=[nowhere.txt]")
    assert gone.code == 2 and "nowhere.txt does not exist" in gone.err
