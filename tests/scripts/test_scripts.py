"""The scripts that measure and train, end to end with tiny sizes."""

import json
import random
import tarfile
from dataclasses import replace

import pytest

from tests.support.scripts import call, load
from tests.support.training import write_texts

DISTIL = """\
drafter: null
precision: float32
data: {{sources: ['{texts}'], context: 192, windows: 4, written: 0.5, written_tokens: 16, max_loop_rate: 1.0}}
views: {{budgets: [40, 100]}}
optimizer: {{steps: 2, lr: 1.0e-2, warmup: 1}}
evaluation:
  {{sources: ['{texts}'], every: 2, contexts: [64, 128], budgets: [40, 100, full], passages: 2, new_tokens: 16}}
"""


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path / "texts", 8, 5000)


@pytest.fixture
def recipe(tmp_path, texts):
    path = tmp_path / "r.yaml"
    path.write_text(DISTIL.format(texts=texts))
    return path


# -- ablation


def test_every_arm_is_trained_on_the_same_and_measured_alike(tmp_path, recipe, texts):
    script, out = load("ablation"), tmp_path / "out"
    words = ("run", recipe, "--out", out, "--arms", "none,full,paper,ours", "--seeds", "3")
    measured_on = ("--on", f"x={texts}", "--on-contexts", "64,128", "--on-passages", "2", "--on-tokens", "16")
    shown = call(script, *words, *measured_on)
    rows = [line.split(" | ") for line in shown.splitlines() if line.startswith("| ")]
    assert [(r[0], r[1]) for r in rows[2:]] == [
        ("| no distillation", "window rebased"),
        ("| full cache only", "window rebased"),
        ("| the paper's recipe", "official absolute"),
        ("| the paper's recipe", "window rebased"),
        ("| ours", "window rebased"),
    ]
    assert "2 passages of x" not in shown and "4 passages of x" in shown  # two of each context
    found = {r["arm"]: r for r in script.results(out)}
    assert found["none"]["trained"] is None and found["ours"]["trained"]["steps"] == 2
    assert found["ours"]["trained"]["positions_per_target_token"] == 4
    assert found["paper"]["trained"]["positions_per_target_token"] == pytest.approx(2 * 48 / 192)
    grids = {name: r["readings"]["window"] for name, r in found.items()}
    assert all([(c["context"], c["budget"]) for c in g] == [(c["context"], c["budget"]) for c in grids["none"]]
               for g in grids.values())  # fmt: skip
    assert (out / "data-3" / "manifest.json").exists() and not (out / "ours-3" / "data").exists()
    before = (out / "ours-3" / "measured.json").read_bytes()
    (out / "full-3" / "measured.json").unlink()
    assert call(script, *words, *measured_on) == shown, "what is missing is made again, with the same figures"
    assert (out / "ours-3" / "measured.json").read_bytes() == before and call(script, "table", out) == shown
    assert grids["none"] != grids["ours"], "training changed nothing"


def test_the_table_counts_gains_between_rows_read_alike():
    script = load("ablation")

    def result(arm, seed, least, full, reading="window"):
        cells = [
            {
                "dataset": "x",
                "context": c,
                "budget": b,
                "gamma": 5,
                "acceptance_rate_no_loops": r - c / 1e6,
                "passages": 3,
            }
            for c in (1000, 3000)
            for b, r in ((256, least), (512, 0.5), ("full", full))
        ]
        return {"arm": arm, "seed": seed, "trained": None, "readings": {reading: cells}}

    found = [result("none", 0, 0.30, 0.40), result("ours", 0, 0.40, 0.41), result("ours", 1, 0.42, 0.43)]
    none, ours = [line.split(" | ") for line in script.as_markdown(found).splitlines()[2:4]]
    assert none[2:7] == ["1", "29.8 ± 0.0", "49.8 ± 0.0", "39.8 ± 0.0", "+10.0 ± 0.0"]
    assert ours[2:9] == ["2", "40.8 ± 1.0", "49.8 ± 0.0", "41.8 ± 1.0", "+1.0 ± 0.0", "+0.2 ± 0.0", "+11.0"]
    assert script.as_markdown([]) == "Nothing is measured yet."


def test_the_paper_teaches_less_than_a_tenth_of_our_positions_per_target_pass(recipe):
    from bdcli.config.distill import DistillRecipe
    from bdcli.config.loader import load_recipe

    script = load("ablation")
    base = load_recipe(recipe, DistillRecipe, ["data.context=512", "data.written_tokens=32"])
    base = replace(base, views=replace(base.views, budgets=(64, 256)))
    found = {name: script.cost_of(script.ARMS[name].change(base), 1) for name in ("paper", "ours")}
    assert found["paper"]["positions"] == 256 and found["ours"]["positions"] == 2048
    assert all(c["seconds"] > 0 and c["peak"] >= c["loaded"] > 0 for c in found.values())
    long = replace(base, data=replace(base.data, context=4096))
    arms = {name: replace(script.ARMS[name].change(long)) for name in ("paper", "ours")}
    assert arms["paper"].anchors() == (3840,) and arms["paper"].views.anchor_tokens == 256
    lines = script.cost_markdown(found).splitlines()
    assert len(lines) == 4 and "| 8.0 |" in lines[3]


# -- from nothing, on another machine


def test_the_pair_is_trained_from_an_archive_and_comes_home_in_pieces(tmp_path, texts):
    script, out, archive = load("train_pocket"), tmp_path / "out", tmp_path / "corpus.tar.xz"
    shown = call(script, "pack", texts, "--out", archive, "--limit-mib", "4")
    with tarfile.open(archive) as packed:
        names = {m.name for m in packed}
    assert names == {p.name for p in texts.iterdir()} and "8 of 8 texts" in shown
    mix = ["corpus.sources=['CORPUS']".replace("CORPUS", str(archive)), "corpus.weights=[]", "compile=false"]
    small = [
        "schedule.tokens=2048",
        "schedule.reach=0",
        "schedule.contexts=[128]",
        "schedule.shares=[1]",
        "schedule.tokens_per_step=512",
    ]
    held = [f"held_out.sources=['{texts}']", "held_out.contexts=[320]", "held_out.documents=2", "precision=float32"]
    shape = ["shape.hidden_size=32", "shape.intermediate_size=64", "shape.heads=2", "shape.kv_heads=1"]
    shape += ["shape.max_position=1024"]
    target = [*mix, *small, *held, *shape, "shape.layers=2", "shape.vocab_size=300"]
    tiny = ["context=192", "windows=3", f"sources=['{archive}']", "written_tokens=16", "max_loop_rate=1.0"]
    drafter = [f"data.{s}" for s in tiny] + ["views.budgets=[40, 100]", "optimizer.steps=2", "precision=float32"]
    drafter += [f"evaluation.{s}" for s in (f"sources=['{texts}']", "contexts=[64]", "budgets=[40, full]")]
    drafter += ["evaluation.passages=2", "evaluation.new_tokens=16", "evaluation.every=2"]
    words = ["train", "--corpus", archive, "--out", out]
    for flag, settings in (("--set-target", target), ("--set-start", [*mix, *small, *held, *shape]),
                           ("--set-short", [*drafter, "views.budgets=[40]"]), ("--set-drafter", drafter)):  # fmt: skip
        words += [word for setting in settings for word in (flag, setting)]
    assert call(script, *words, "--minutes", "0") == "" and not (out / "target" / "result.json").exists()
    call(script, *words)
    grids = {name: json.loads((out / name / "result.json").read_text()) for name in ("drafter", "naive")}
    assert all({c["budget"] for c in g["after"]} == {40, "full"} for g in grids.values())
    assert grids["drafter"]["positions_per_target_token"] == 4 and grids["naive"]["positions_per_target_token"] == 1
    call(script, "pieces", out, "--out", tmp_path / "carried", "--mib", "0.05")
    pieces = sorted((tmp_path / "carried").iterdir())
    assert len(pieces) > 3 and max(p.stat().st_size for p in pieces) <= 0.05 * 2**20
    call(script, "join", tmp_path / "carried", tmp_path / "home")
    for stage, model in (("target", "model"), ("drafter", "drafter"), ("naive", "drafter"), ("start", "model")):
        for path in (out / stage / model).iterdir():
            assert (tmp_path / "home" / stage / path.name).read_bytes() == path.read_bytes()
    pieces[1].write_bytes(b"torn")
    with pytest.raises(script.UserError, match="damaged"):
        call(script, "join", tmp_path / "carried", tmp_path / "again")


def test_an_archive_stays_below_its_limit(tmp_path):
    script, rng = load("train_pocket"), random.Random(0)
    for n in range(8):
        (tmp_path / f"{n}.txt").write_text(rng.randbytes(350_000).hex())  # 700 KB that shrink to half
    shown = call(script, "pack", tmp_path, "--out", tmp_path / "a.tar.xz", "--limit-mib", "3")
    assert 1 < int(shown.split(": ")[1].split(" of 8")[0]) < 8
    assert 2**20 / 2 < (tmp_path / "a.tar.xz").stat().st_size <= 3 * 2**20
