"""A dry run prints what a run would do, and writes nothing anywhere."""

import pytest

from bdcli.config.distill import DistillRecipe
from bdcli.config.loader import load_recipe
from bdcli.data.document import is_held_out
from bdcli.model.checkpoint import read_config
from bdcli.model.hub import POCKET
from bdcli.train.distill import checks as distill_checks
from tests.support.training import write_texts

DISTILL = """\
data: {context: 192, windows: 3, written: 0.5, written_tokens: 16}
evaluation: {contexts: [64], budgets: [40, full], passages: 3, new_tokens: 16}
"""
PRETRAIN = """\
shape: {layers: 1, hidden_size: 32, intermediate_size: 48, vocab_size: 300}
schedule: {tokens: 2048, contexts: [512], shares: [1], tokens_per_step: 1024}
corpus: {sources: [texts]}
"""
KINDS = {
    "window": ("distill", DISTILL, ["views.budgets=[40, 100]"]),
    "first layers": ("distill", DISTILL, ["views.budgets=[40, 100]", "drafter=null", "layers=1"]),
    "chunk": ("distill", DISTILL, ["views={select: chunk, budgets: [64], anchors: [120], anchor_tokens: 20}"]),
    "prepare": ("prepare", DISTILL, ["views.budgets=[40, 100]", "data.cache=hidden"]),
    "prepare first layers": ("prepare", DISTILL, ["views.budgets=[40, 100]", "drafter=null"]),
    "from nothing": ("pretrain", PRETRAIN, []),
    "from a model": ("pretrain", PRETRAIN, ["init=pocket"]),
    "another depth": ("pretrain", PRETRAIN, ["init=pocket", "layers=2"]),
}


def contents(folder):
    """Every path below a folder, with the bytes of files."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("out", [False, True], ids=["default folder", "given folder"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_writes_nothing(kind, out, tmp_path, monkeypatch, cli):
    command, recipe, settings = KINDS[kind]
    write_texts(tmp_path / "texts")
    (tmp_path / "r.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    before = contents(tmp_path)
    words = [word for setting in settings for word in ("--set", setting)]
    done = cli(command, "r.yaml", "--dry-run", *words, *(["--out", tmp_path / "a" / "run"] if out else []))
    assert done.code == 0 and done.out == "" and "disk" in done.err and "take" in done.err, done.err
    assert contents(tmp_path) == before


def test_a_dry_run_finds_what_would_end_the_run_later(tmp_path, cli):
    """More answers than the vocabulary has, and texts none of which was drawn for measuring."""
    name = next(name for name in map(str, range(99)) if not is_held_out(name))
    (tmp_path / "books").mkdir()
    book = tmp_path / "books" / f"{name}.txt"
    book.write_text("word " * 4000)
    (tmp_path / "p.yaml").write_text(PRETRAIN)
    most = read_config(POCKET / "target").vocab_size

    def problems(*overrides):
        return list(distill_checks.missing_inputs(load_recipe(None, DistillRecipe, list(overrides))))

    too_many = f"must be at most {most}, the vocabulary of the target"
    assert problems("data.cache=topk", f"data.top_k={most + 1}") == [("data.top_k", too_many)]
    not_drawn = f"none of the 1 documents of {book} was drawn for measuring"
    assert problems(f"data.sources=[{book}]") == [("evaluation.sources", not_drawn)]
    assert problems(f"data.sources=[{book.parent}]")[0][0] == "evaluation.sources"
    assert problems("data.cache=topk", f"data.top_k={most}") == problems(f"data.top_k={most + 1}") == []
    assert problems(f"data.sources=[{book}]", f"evaluation.sources=[{book}]") == []
    found = cli("pretrain", tmp_path / "p.yaml", "--dry-run", "--set", f"corpus.sources=[{book}]")
    assert found.code == 2 and f"held_out.sources: {not_drawn}" in found.err, found.err
