"""Training on models whose tokens are not those of a plain pair, and what a resumed run notices."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bdcli.base.errors import UserError
from bdcli.cache.selection import Full, Window
from bdcli.config.distill import Data
from bdcli.data.corpus import make_corpus
from bdcli.data.identity import sources_identity
from bdcli.data.split import TrainingDocuments, held_out_prompts, held_out_windows
from bdcli.model.checkpoint import load_model
from bdcli.model.tokenizer import load_tokenizer
from bdcli.train.distill.objective import Objective
from bdcli.train.distill.run import Distillation
from bdcli.train.distill.teacher import answers_to_store, stored_target
from bdcli.train.forward import final_rows
from bdcli.train.targets import ArgmaxTarget, HiddenTarget, TopKTarget
from tests.support.folders import APPENDS_EOS, CPU, add_token, edit, pad_vocabulary, pocket_copy
from tests.support.training import SMALL_DISTILL, small_pretrain, write_texts

ROWS = 4224
SELECTIONS = [Full(), Window(40)]


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """(target, drafter) with more rows than their tokenizer has tokens, and their folders."""
    folder = tmp_path_factory.mktemp("padded")
    folders = [pad_vocabulary(pocket_copy(role, folder / role), ROWS) for role in ("target", "drafter")]
    return [load_model(path, torch.float32, CPU) for path in folders], folders


def answers(recipe, target, ids):
    """What the target teaches of ids, as the recipe stores it, or its hidden states."""
    if recipe.data.cache == "none":
        return HiddenTarget(final_rows(target, ids), target.head)
    return stored_target(answers_to_store(recipe, target, ids), target.head, recipe.loss.temperature)


def loss_and_gradient(recipe, target, drafter, ids):
    drafter.head.requires_grad_()
    objective = Objective(recipe, drafter, torch.float32, target.config.vocab_size)
    loss = objective.loss(ids, answers(recipe, target, ids), SELECTIONS, 1)
    found = torch.autograd.grad(loss, drafter.head)[0]
    drafter.head.requires_grad_(False)
    return float(loss.detach()), found


@pytest.mark.parametrize("cache", ["none", "hidden", "topk", "argmax"])
@pytest.mark.parametrize("kind", ["kl", "ce", "lk", "log_alpha"])
@pytest.mark.parametrize("larger", ["target", "drafter"])
def test_padding_of_either_vocabulary_teaches_nothing(pocket, padded, cache, kind, larger):
    """Loss and gradients are those of the pair without padding; the padding's own rows get none."""
    temperature = 0.0 if cache == "argmax" else 1.0
    recipe = replace(
        SMALL_DISTILL,
        data=replace(SMALL_DISTILL.data, cache=cache, top_k=32),
        loss=replace(SMALL_DISTILL.loss, kind=kind, temperature=temperature, weights="accepted_length"),
        temperature=temperature,
    )
    ids = torch.arange(120) * 37 % 4000
    want, gradient = loss_and_gradient(recipe, pocket[0], pocket[1], ids)
    pair = (padded[0][0], pocket[1]) if larger == "target" else (pocket[0], padded[0][1])
    got, padded_gradient = loss_and_gradient(recipe, *pair, ids)
    close = 2e-5
    if cache == "hidden" or (cache == "topk" and larger == "target"):
        close = 0.06  # stored in bf16; padding has some of the 32 places, so that less of the tail is known
    assert got == pytest.approx(want, rel=close)
    assert (padded_gradient[:4096] - gradient).norm() <= 3 * close * gradient.norm()
    assert not padded_gradient[4096:].any()


def test_what_a_drafter_does_not_have_is_left_out_of_every_kind_of_target():
    torch.manual_seed(0)
    hidden, head = torch.randn(9, 6), torch.randn(12, 6)
    exact, lost = HiddenTarget(hidden, head).within(8)
    p = torch.nn.functional.linear(hidden, head)[:, :8].softmax(-1)
    assert lost is None and torch.allclose(exact.read(slice(0, 9), 1.0)[1](None).exp(), p, atol=1e-6)
    logs = torch.nn.functional.linear(hidden, head).log_softmax(-1).topk(5)
    short, lost = TopKTarget(logs.indices, logs.values, 1.0).within(8)
    best, with_tail = short.read(slice(0, 9), 1.0)
    found = with_tail(torch.zeros(9, 8).log_softmax(-1)).exp()
    assert torch.allclose(found.sum(-1), torch.ones(9), atol=1e-5) and not lost.all()
    share = 1 - logs.values.exp().masked_fill(logs.indices < 8, 0).sum(-1)  # of the tokens that both have
    for row in range(9):
        known = [(i, float(v.exp())) for i, v in zip(logs.indices[row].tolist(), logs.values[row]) if i < 8]
        assert all(found[row, i] == pytest.approx(v / float(share[row]), rel=1e-4) for i, v in known)
        assert bool(lost[row]) == (not known) and (not known or best[row] == known[0][0])
    chosen, lost = ArgmaxTarget(torch.tensor([3, 9, 7])).within(8)
    assert chosen.index.tolist() == [3, 0, 7] and lost.tolist() == [False, True, False]


def test_a_token_that_the_drafter_lacks_has_no_weight(pocket):
    """The target chose a token beyond the drafter's vocabulary in one row: the loss is that of the others."""
    ids = torch.arange(60) * 37 % 4000
    recipe = replace(SMALL_DISTILL, loss=replace(SMALL_DISTILL.loss, kind="ce", temperature=0.0))
    objective = Objective(recipe, pocket[1], torch.float32, ROWS)
    choices = torch.arange(60) * 11 % 4000
    others = [float(objective.loss(ids, ArgmaxTarget(choices), [Full()], 1))]
    choices[7] = 4100
    others.append(float(objective.loss(ids, ArgmaxTarget(choices), [Full()], 1)))
    choices[7] = 0
    others.append(float(objective.loss(ids, ArgmaxTarget(choices), [Full()], 1)))
    assert others[1] < min(others[0], others[2]) and others[1] > 0


@pytest.mark.parametrize("larger", ["target", "drafter"])
def test_distil_a_pair_whose_vocabularies_differ_by_padding(padded, tmp_path, larger):
    recipe = replace(SMALL_DISTILL, **{larger: str(padded[1][larger == "drafter"])})
    recipe = replace(recipe, data=replace(recipe.data, cache="topk"), temperature=1.0)
    recipe = replace(recipe, loss=replace(recipe.loss, kind="kl", temperature=1.0))
    recipe = replace(recipe, optimizer=replace(recipe.optimizer, steps=2))
    done = Distillation(recipe, tmp_path / "run").run(resume=False)
    assert done.status == "done" and done.steps == 2 and done.skipped == 0
    assert all(cell.acceptance_rate is not None for cell in done.after)


# -- tokens of documents


@pytest.fixture
def books(tmp_path) -> Path:
    return write_texts(tmp_path / "books")


def test_a_document_ends_with_one_eos(tmp_path, books):
    """Also where the tokenizer appends one; neither windows nor measured texts begin with it."""
    folder = pocket_copy("target", tmp_path / "t")
    plain = load_tokenizer(folder)
    edit(folder / "tokenizer.json", post_processor=APPENDS_EOS)
    appends = load_tokenizer(folder)
    for make in (
        lambda tokenizer: [c.ids for c in TrainingDocuments([str(books)]).windows(tokenizer, 256, 0)],
        lambda tokenizer: held_out_prompts(tokenizer, [str(books)], 128, 3, everything=True),
        lambda tokenizer: held_out_windows(tokenizer, [str(books)], 128, 3, everything=True),
    ):
        assert make(plain) == make(appends)
    recipe = small_pretrain(books)
    streams = [make_corpus(recipe, t, "v", tmp_path / f"{n}.pt").streams for n, t in enumerate((plain, appends))]
    assert all(torch.equal(a, b) for a, b in zip(*streams, strict=True))
    assert not ((streams[0][0][1:] == 1) & (streams[0][0][:-1] == 1)).any() and (streams[0][0] == 1).any()


def test_a_token_without_an_embedding_ends_the_preparation(tmp_path, books):
    folder = pocket_copy("target", tmp_path / "t")
    add_token(folder, special=False)  # a special one is text like any other in training
    tokenizer = load_tokenizer(folder)
    for file in books.iterdir():
        file.write_text(file.read_text("utf-8") + "<extra>", "utf-8")
    for make in (
        lambda: list(TrainingDocuments([str(books)]).windows(tokenizer, 256, 0)),
        lambda: held_out_prompts(tokenizer, [str(books)], 128, 3, everything=True),
        lambda: make_corpus(small_pretrain(books), tokenizer, "v", tmp_path / "tokens.pt"),
    ):
        with pytest.raises(UserError, match="'<extra>' has id 4096"):
            make()


# -- identity


def test_the_identity_of_sources(tmp_path, books):
    def now(*sources: object) -> str:
        return sources_identity([str(source) for source in sources])

    first = next(books.iterdir())
    seen = [now(books), now("stdlib"), now("recall"), now("pg19"), now(first), now(first, "stdlib")]
    assert len(set(seen)) == 6 and now(books) == seen[0]
    (books / "README.md").write_text("no text of this source")
    assert now(books) == seen[0]
    stat = first.stat()
    first.write_text(first.read_text("utf-8")[::-1], "utf-8")
    os.utime(first, ns=(stat.st_mtime_ns + 10**9,) * 2)
    assert now(books) != seen[0] and now(first) != seen[4]
    before = now(books)
    first.rename(first.with_name("other.txt"))
    assert now(books) != before and now(tmp_path / "nowhere") == now(tmp_path / "nowhere")


def zero_a_layer(folder: Path) -> None:
    model = folder / "model.safetensors"
    body = bytearray(model.read_bytes())
    middle = len(body) // 2
    body[middle : middle + 4096] = bytes(4096)
    model.write_bytes(body)


CHANGES = {
    "target": zero_a_layer,
    "target ": lambda folder: edit(folder / "generation_config.json", eos_token_id=[1, 2]),
    "target  ": lambda folder: edit(folder / "tokenizer_config.json", pad_token="<s>"),
    "data.sources": None,
}


@pytest.mark.parametrize("changed", CHANGES)
def test_a_stopped_preparation_notices_another_model_and_other_books(tmp_path, books, changed):
    folder = pocket_copy("target", tmp_path / "t")
    recipe = replace(SMALL_DISTILL, target=str(folder))
    recipe = replace(recipe, data=Data(sources=(str(books),), context=128, windows=2, written=0.0))
    recipe = replace(recipe, evaluation=replace(recipe.evaluation, sources=("recall",)))
    assert len(Distillation(recipe, tmp_path / "run").material().windows()) == 2
    if changed == "data.sources":
        (books / "new.txt").write_text("one more book " * 500)
    else:
        CHANGES[changed](folder)
    with pytest.raises(UserError, match=rf"was made for another {changed.strip()}\b") as error:
        Distillation(recipe, tmp_path / "run").material().windows()
    assert "\n" not in str(error.value)
    manifest = json.loads((tmp_path / "run" / "data" / "manifest.json").read_text())
    assert manifest["complete"] and len(manifest["shards"]) == 1
