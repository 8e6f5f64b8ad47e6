"""Pretraining: the model learns what it reads, never what is measured, and goes on bit for bit after a stop."""

import itertools
import math
import tarfile
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bdcli.base.errors import UserError
from bdcli.cache.full import FullCache
from bdcli.cache.view import FULL
from bdcli.config.optimizer import Updates
from bdcli.config.pretrain import Corpus as Mix
from bdcli.config.pretrain import HeldOut, MuonUpdates, PretrainRecipe, Schedule, Shape
from bdcli.data.corpus import Corpus, make_corpus, ordinary_ids
from bdcli.data.sources import documents, measured_windows
from bdcli.data.synthetic import recall_documents
from bdcli.model.build import with_layers
from bdcli.model.checkpoint import POCKET, load_model, load_tokenizer
from bdcli.model.rope import RopeTable
from bdcli.train.forward import attend, causal_hidden
from bdcli.train.held_out import SHORT_ROWS, measure, window_losses
from bdcli.train.optimizers import Muon, make_optimizers, orthogonal, trapezoid
from bdcli.train.pretrain.copying import LENGTH, WINDOWS, guide_loss, lesson
from bdcli.train.pretrain.run import Pretraining, skipped
from bdcli.train.trainer import Trainer
from tests.support.models import tiny_model


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of small texts."""
    folder = tmp_path_factory.mktemp("texts")
    for name, body in recall_documents(12, 6000):
        (folder / f"{name.replace(':', '')}.txt").write_text(body, "utf-8")
    return folder


def small(text, **changes):
    recipe = PretrainRecipe(
        corpus=Mix((str(text),)),
        shape=Shape(
            layers=2, hidden_size=32, intermediate_size=64, heads=2, kv_heads=1, max_position=1024, vocab_size=300
        ),
        schedule=Schedule(tokens=8192, contexts=(128, 512), shares=(0.5, 0.5), tokens_per_step=512, micro_tokens=256),
        optimizer=MuonUpdates(lr=1e-2, vector_lr=1e-2),
        held_out=HeldOut((str(text),), (512,), 2, every=6),
        precision="float32",
    )
    return replace(recipe, **changes)


def weights(folder):
    return load_model(folder, torch.float32, torch.device("cpu")).tensors()


def test_a_model_from_nothing_learns_and_transformers_reads_it(tmp_path, text):
    from transformers import AutoModelForCausalLM

    told = []
    job = Pretraining(small(text), tmp_path / "run", measured=lambda *said: told.append(said[:2]))
    assert any("from nothing" in line for line in job.plan())
    done = job.run(resume=False)
    assert (done.status, done.steps, done.tokens, done.skipped) == ("done", 16, 8192, 0)
    assert told == [(0, 0), (6, 3072), (12, 6144), (16, 8192)]
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
    whole = Pretraining(small(text), tmp_path / "whole").run(resume=False)
    job = Pretraining(small(text), tmp_path / "parts", minutes=0)
    first = job.run(resume=False)
    assert first.stopped == "out of time" and 0 < first.steps < 4
    rest = Pretraining(small(text), tmp_path / "parts").run(resume=True)
    assert rest.steps == whole.steps and rest.after == whole.after
    assert all(torch.equal(a, b) for a, b in zip(weights(whole.checkpoint), weights(rest.checkpoint), strict=True))
    other = small(text, seed=1)
    with pytest.raises(UserError, match="another recipe"):
        Pretraining(other, tmp_path / "parts").run(resume=True)
    (tmp_path / "parts" / "state.pt").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"state\.pt is damaged"):
        Pretraining(small(text), tmp_path / "parts").run(resume=True)
    assert (tmp_path / "parts" / "state.pt").read_bytes() == b"torn"


def test_going_on_from_a_checkpoint_keeps_its_tokenizer(tmp_path, text):
    schedule = Schedule(tokens=512, contexts=(512,), shares=(1.0,), tokens_per_step=512)
    job = Pretraining(small(text, init=str(POCKET / "drafter"), schedule=schedule), tmp_path / "run")
    done = job.run(resume=False)
    assert (done.checkpoint / "tokenizer.json").read_bytes() == (POCKET / "drafter" / "tokenizer.json").read_bytes()
    assert done.before[0].nll < 9


@pytest.mark.parametrize("family", [{}, {"biases": True}, {"qk_norm": True, "kv_heads": 1}])
def test_another_depth_begins_as_the_model_it_comes_from(family):
    model = tiny_model(**family)
    deeper, cut = with_layers(model, 4, seed=1), with_layers(model, 1, seed=1)
    want = model.forward(list(range(9)), FullCache(model, 9), 9)
    assert torch.equal(deeper.forward(list(range(9)), FullCache(deeper, 9), 9), want)
    assert not torch.allclose(cut.forward(list(range(9)), FullCache(cut, 9), 9), want, atol=0.1)
    assert len(cut.layers) == cut.config.layers == 1 and torch.equal(cut.layers[0].qkv, model.layers[0].qkv)
    assert deeper.layers[3].qkv.std() > 0  # what reads is random, so that gradients reach it once outputs move
    made = Trainer(deeper, Updates(method="muon"))
    ids = torch.arange(9)[None]
    rope = RopeTable(deeper.config.rope, 9, 9, torch.float32, "cpu")
    for _ in range(2):
        made.step(lambda _: [lambda: causal_hidden(deeper, rope, ids).square().mean()])
    assert deeper.layers[3].out.abs().max() > 0 and deeper.layers[3].down.abs().max() > 0


def test_the_first_layers_of_a_model_are_a_start(tmp_path, text):
    first = Pretraining(small(text), tmp_path / "a").run(False)
    job = Pretraining(small(text, init=str(first.checkpoint), layers=1), tmp_path / "b")
    assert job.shape.layers == 1
    done = job.run(False)
    assert load_model(done.checkpoint, torch.float32, torch.device("cpu")).config.layers == 1
    assert torch.equal(weights(tmp_path / "b" / "start")[0], weights(first.checkpoint)[0])
    assert done.after[0].nll < done.before[0].nll
    assert [key for key, _ in small(text, layers=1).problems()] == ["layers"]


def test_loss_is_the_mean_over_following_tokens_whatever_the_micro_batches(tmp_path, text):
    job = Pretraining(small(text), tmp_path / "run")
    job.model = tiny_model(vocab=300)
    windows = torch.randint(0, 300, (4, 50))
    parts = sum(float(job.loss(w, 4)) for w in windows.split(1))
    logits = torch.stack([job.model.forward(w.tolist(), FullCache(job.model, 50), 50) for w in windows])
    want = F.cross_entropy(logits[:, :-1].reshape(-1, 300), windows[:, 1:].reshape(-1))
    assert parts == pytest.approx(float(want), rel=1e-4) and float(job.loss(windows, 4)) == pytest.approx(
        parts, rel=1e-5
    )


@pytest.mark.parametrize("rows", [SHORT_ROWS, 4])
def test_the_worth_of_a_long_context_is_that_of_a_cut_one(rows):
    """The short losses must equal those of texts cut to their last tokens, each cut text read alone."""
    model, window = tiny_model(vocab=300), torch.randint(0, 300, (512,))
    whole, tail, short = window_losses(model, window, torch.float32, rows)
    alone = []
    for start in range(512 - 256, 512, rows):  # tail of 256 tokens, predicted `rows` at a time
        cut = window[start - 256 : start + rows].tolist()
        logits = model.forward(cut, FullCache(model, len(cut)), rows + 1)[:-1]
        alone.append(F.cross_entropy(logits, torch.tensor(cut[-rows:]), reduction="none"))
    torch.testing.assert_close(short, torch.cat(alone), rtol=1e-4, atol=1e-4)
    logits = model.forward(window.tolist(), FullCache(model, 512), 512)[:-1]
    torch.testing.assert_close(whole, F.cross_entropy(logits, window[1:], reduction="none"), rtol=1e-4, atol=1e-4)
    assert torch.equal(tail, whole[-256:])
    if rows == SHORT_ROWS:
        got = measure(model, window[None], 512, torch.float32)
        assert (got.nll, got.tail_nll) == (float(whole.mean()), float(tail.mean()))
        assert got.tail_nll_short == pytest.approx(float(torch.cat(alone).mean()), rel=1e-4)
        assert got.tail_nll != pytest.approx(got.tail_nll_short, rel=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_batched_rows_equal_decoding(kv_heads):
    model = tiny_model(kv_heads=kv_heads)
    ids = torch.randint(0, 41, (3, 37), generator=torch.Generator().manual_seed(kv_heads))
    table = RopeTable(model.config.rope, 37, 37, torch.float32, "cpu")
    for row, x in zip(ids, causal_hidden(model, table, ids)):
        want = model.forward(row.tolist(), FullCache(model, 37), 37)
        assert (model.logits(x) - want).abs().max() < 2e-4 * want.abs().max()


# -- data


def test_the_mix_keeps_its_shares_and_every_stream_moves_on():
    recipe = PretrainRecipe(corpus=Mix(("a", "b", "c"), (0.5, 0.3, 0.2)))
    streams = [torch.arange(k * 10_000, k * 10_000 + size, dtype=torch.int32) for k, size in enumerate((900, 400, 90))]
    corpus, cursor, seen = Corpus(recipe, streams), [0, 0, 0], []
    for context in (10, 20, 40) * 20:
        seen += corpus.take(cursor, context, 3).flatten().tolist()
    shares = [sum(k * 10_000 <= t < (k + 1) * 10_000 for t in seen) / len(seen) for k in range(3)]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.01) and sum(cursor) == len(seen)
    assert seen[:10] == list(range(10)) and set(seen) >= set(range(900 - 40))


def test_copies_are_beside_the_sources_and_can_be_foretold(tmp_path, pocket):
    recipe = PretrainRecipe(
        corpus=Mix(("stdlib", "recall"), (3.0, 1.0), copies=0.2), schedule=Schedule(tokens=40_000, contexts=(1024,))
    )
    corpus = make_corpus(recipe, pocket[2], "vocabulary", tmp_path / "tokens.pt", lambda *_: None)
    assert corpus.shares == pytest.approx([0.6, 0.2, 0.2])
    ids, known = corpus.streams[2].tolist(), 0
    assert len(ids) == 8_000 + 2 * 1024 and 0 not in ids and 1 not in ids and len(set(ids)) > 1_500
    last: dict[tuple, int] = {}
    for at in range(2, len(ids)):  # two ids tell the third, where they have stood before
        known += last.get(tuple(ids[at - 2 : at])) == ids[at]
        last[tuple(ids[at - 2 : at])] = ids[at]
    assert known > 0.45 * len(ids)
    again = make_corpus(recipe, pocket[2], "vocabulary", tmp_path / "tokens.pt", lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(corpus.streams, again.streams))


def test_recall_texts_repeat_near_and_far():
    (name, text), again = next(recall_documents(1)), next(recall_documents(1))
    assert (name, text) == again and len(text) >= 48_000
    sources = {line: [] for line in text.splitlines() if len(line) > 20}
    for at, line in enumerate(text.splitlines()):
        if line in sources:
            sources[line].append(at)
    gaps = [b - a for places in sources.values() for a, b in itertools.pairwise(places)]
    assert min(gaps) <= 2 and max(gaps) > 100 and len(gaps) > 0.3 * len(text.splitlines()) / 2


def test_tars_of_texts_are_read_and_broken_ones_named(tmp_path, text):
    with tarfile.open(tmp_path / "books.tar.xz", "w:xz") as archive:
        for path in sorted(text.iterdir()):
            archive.add(path, path.name)
    names = {d.name for d in documents(str(tmp_path / "books.tar.xz"))}
    assert names == {p.stem for p in text.iterdir()}
    torn = tmp_path / "torn.tar.xz"
    torn.write_bytes((tmp_path / "books.tar.xz").read_bytes()[:500])
    with pytest.raises(UserError, match=r"torn\.tar\.xz cannot be read"):
        list(documents(str(torn)))
    (tmp_path / "x.pdf").write_bytes(b"%PDF")
    with pytest.raises(UserError, match="of no kind"):
        list(documents(str(tmp_path / "x.pdf")))


def test_measured_windows_come_from_held_out_documents_only(text, pocket):
    held = {d.name for d in documents(str(text)) if d.held_out}
    bodies = {d.name: pocket[2](d.text)["input_ids"] for d in documents(str(text))}
    try:
        found = measured_windows(pocket[2], [str(text)], 512, 20, everything=False)
    except UserError:
        found = []
    inside = [{n for n, ids in bodies.items() if w[:40] == ids[(len(ids) - 512) // 2 :][:40]} for w in found]
    assert all(names <= held for names in inside) and len(found) == len(held)
    assert len(measured_windows(pocket[2], [str(text)], 512, 20, everything=True)) == len(bodies)


# -- copying


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_guide_asks_for_attention_where_a_copy_would_be_found(kv_heads):
    """Against plain loops over one text's scores."""
    model, g = tiny_model(kv_heads=kv_heads), torch.Generator().manual_seed(kv_heads)
    c, length = model.config, 23
    ids = torch.randint(0, 5, (2, length), generator=g)
    ids[1] = torch.arange(length) % 19  # one text that hardly repeats
    rope = RopeTable(c.rope, length, length, torch.float32, "cpu")
    previous, induced = [], []
    for row in ids.tolist():
        x = F.embedding(torch.tensor(row), model.embedding)
        for number, layer in enumerate(model.layers):
            qk, v = model.project(layer, x)
            turned = rope.rotate(qk, rope.rows(slice(0, length)))
            for t in range(length):
                weights = (turned[: t + 1, c.heads] @ turned[t, 0] / c.head_dim**0.5).softmax(0)
                if number == 0 and t > 0:
                    previous.append(-math.log(weights[t - 1]))
                followers = [s for s in range(1, t + 1) if row[s - 1] == row[t]]
                if number == len(model.layers) - 1 and followers:
                    induced.append(-math.log(sum(weights[s] for s in followers)))
            x = model.mix(layer, x, attend(rope, qk, v, FULL))
    want = sum(previous) / len(previous) + sum(induced) / len(induced)
    assert float(guide_loss(model, ids, torch.float32)) == pytest.approx(want, rel=1e-4)
    assert len(induced) < len(previous)
    with pytest.raises(ValueError, match="two layers"):
        guide_loss(with_layers(model, 1, 0), ids, torch.float32)


def test_lessons_repeat_themselves_and_move_the_heads(pocket):
    ids = ordinary_ids(pocket[2])
    once, again, other = lesson(0, 5, ids), lesson(0, 5, ids), lesson(0, 6, ids)
    assert torch.equal(once, again) and not torch.equal(once, other) and once.shape == (WINDOWS, LENGTH)
    known = [len(set(row)) / LENGTH for row in once.tolist()]
    assert max(known) < 0.75 and 0 not in once and 1 not in once
    model = tiny_model(vocab=len(pocket[2]))
    made = Trainer(model, Updates(method="muon", lr=2e-2))
    losses = [made.step(lambda _: [lambda: guide_loss(model, once, torch.float32)]) for _ in range(30)]
    assert losses[-1] < losses[0] - 1.5


def test_a_guided_run_goes_on_after_a_stop_and_wants_two_layers(tmp_path, text):
    guided = small(text, corpus=Mix((str(text),), copies=0.5, guide=0.5))
    whole = Pretraining(guided, tmp_path / "whole").run(False)
    Pretraining(guided, tmp_path / "parts", minutes=0).run(False)
    rest = Pretraining(guided, tmp_path / "parts").run(True)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole.checkpoint), weights(rest.checkpoint), strict=True))
    plain = Pretraining(replace(guided, corpus=replace(guided.corpus, guide=0.0)), tmp_path / "plain").run(False)
    assert not torch.equal(weights(plain.checkpoint)[0], weights(whole.checkpoint)[0])
    with pytest.raises(UserError, match="two layers"):
        Pretraining(replace(guided, shape=replace(guided.shape, layers=1)), tmp_path / "one")
    assert [k for k, _ in replace(guided, corpus=Mix(guide=0.5)).problems()] == ["corpus.guide"]


# -- optimizers


@pytest.mark.parametrize("shape", [(8, 8), (5, 19), (16, 48)])
def test_orthogonal_keeps_singular_vectors_and_levels_singular_values(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(shape[1]))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    got = u.mT @ orthogonal(x) @ vh.mT  # diagonal where the singular vectors are kept
    off = got - torch.diag_embed(got.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 0.08
    assert float(got.diagonal(dim1=1, dim2=2).min()) > 0.5 and float(got.diagonal(dim1=1, dim2=2).max()) < 1.3


def test_muon_takes_stacked_matrices_apart():
    """q, k, v stacked in one tensor must move as three tensors of their own would."""
    g = torch.Generator().manual_seed(0)
    stacked = torch.randn(20, 8, generator=g)
    grad = torch.randn(20, 8, generator=g)
    apart = [t.clone() for t in stacked.split((8, 4, 8))]
    for t, gradient in zip((stacked, *apart), (grad, *grad.split((8, 4, 8))), strict=True):
        t.grad = gradient.clone()
    Muon([(stacked, (8, 4, 8))], 0.1, 0.01).step()
    for t in apart:
        Muon([(t, (t.shape[0],))], 0.1, 0.01).step()
    assert torch.allclose(stacked, torch.cat(apart), atol=2e-3)
    assert not torch.allclose(stacked, torch.cat(apart) * 0, atol=1)


def test_every_trainable_weight_has_exactly_one_optimizer():
    for method in ("adamw", "muon"):
        model = tiny_model()
        for t in model.tensors():
            t.requires_grad_()
        made = make_optimizers(model, Updates(method=method))
        owned = [id(t) for optimizer in made for group in optimizer.param_groups for t in group["params"]]
        assert sorted(owned) == sorted(map(id, model.tensors())) and len(made) == (2 if method == "muon" else 1)


def test_the_rate_rises_stays_and_falls_to_zero():
    rates = [trapezoid(n / 100, 0.1, 0.5) for n in range(101)]
    assert rates[0] == 0 and rates[5] == pytest.approx(0.5) and rates[10] == rates[50] == 1
    assert rates[75] == pytest.approx(0.5) and rates[100] == 0 and rates == [max(0, r) for r in rates]


def test_the_rate_follows_the_clock_where_the_recipe_says_so(tmp_path, text):
    timed = small(text, schedule=replace(small(text).schedule, follow="time"))
    with pytest.raises(UserError, match="--max-minutes"):
        Pretraining(timed, tmp_path / "x")
    job = Pretraining(timed, tmp_path / "x", minutes=1)
    assert job.share(0, 30, 60) == 0.5 and job.share(8192, 30, 60) == 1
    assert Pretraining(small(text), tmp_path / "x", minutes=1).share(0, 30, 60) == 0
    assert [job.stage(s) for s in (0, 0.49, 0.51, 1.0)] == [128, 128, 512, 512]


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


def test_skips_spread_short_windows_over_the_reach():
    made = [skipped(64, 1000, 3, step) for step in range(400)]
    gaps = [int(p[-1]) - 63 for p in made]
    assert all(p[0] == 0 and p.diff().min() == 1 and (p.diff() > 1).sum() <= 1 and p[-1] < 1000 for p in made)
    assert 140 < gaps.count(0) < 260 and max(gaps) > 800 and sum(0 < gap < 30 for gap in gaps) > 60
    assert torch.equal(skipped(64, 1000, 3, 7), made[7]) and skipped(64, 0, 3, 7).equal(torch.arange(64))


def test_a_skip_moves_positions_and_nothing_else():
    """The loss at skipped positions is that of the decode forward fed at those positions."""
    model, ids = tiny_model(layers=2), torch.randint(0, 41, (1, 40))
    rope = RopeTable(model.config.rope, 300, 300, torch.float32, model.device)
    near, gone = torch.arange(40), torch.arange(40)
    gone[25:] += 200
    plain, moved, shifted = (causal_hidden(model, rope, ids, None, p)[0] for p in (near, gone, near + 250))
    torch.testing.assert_close(shifted, plain, rtol=1e-4, atol=1e-4)  # only distances matter
    torch.testing.assert_close(moved[:25], plain[:25])
    assert (moved[25:] - plain[25:]).abs().amax(-1).min() > 1e-4


def test_operations_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    from bdcli.model.build import random_model
    from bdcli.train.estimate import BACKWARD, forward_operations, speed

    model = random_model(
        replace(load_model(POCKET / "drafter", torch.float32, torch.device("cpu")).config, layers=2), 0
    )
    table = RopeTable(model.config.rope, 256, 256, torch.float32, "cpu")
    with FlopCounterMode(display=False) as counted:
        model.logits(causal_hidden(model, table, torch.arange(256)[None])[0])
    products = forward_operations(model.config, 256, 0)  # torch does not count attention on a CPU
    assert counted.get_total_flops() == pytest.approx(products, rel=0.01)
    c = model.config
    scores_and_sums = 2 * c.layers * c.heads * 256 * 100 * 2 * c.head_dim
    assert forward_operations(c, 256, 100) - products == scores_and_sums
    assert speed(Shape(), torch.float32, torch.device("cpu")) > 1e8 and BACKWARD == 3
