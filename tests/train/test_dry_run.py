"""A dry run prints what a run would do, and writes nothing anywhere."""

import pytest

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
