"""The scripts that measure and train, end to end with tiny sizes."""

import importlib.util
import json
import random
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bdcli.data.synthetic import recall_documents
from bdcli.model.checkpoint import POCKET

SCRIPTS = Path(__file__).parents[2] / "scripts"
DISTIL = """\
drafter: null
precision: float32
data: {{sources: ['{texts}'], context: 192, windows: 4, written: 0.5, written_tokens: 16, max_loop_rate: 1.0}}
views: {{budgets: [40, 100]}}
optimizer: {{steps: 2, lr: 1.0e-2, warmup: 1}}
evaluation:
  {{sources: ['{texts}'], every: 2, contexts: [64, 128], budgets: [40, 100, full], passages: 2, new_tokens: 16}}
"""


def load(name):
    """The script as a module; its processes find it by this name too."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(script, *words):
    done = CliRunner().invoke(script.app, [str(w) for w in words], catch_exceptions=False, standalone_mode=False)
    return done.stdout


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, body in recall_documents(8, 5000):
        (folder / f"{name.replace(':', '')}.txt").write_text(body, "utf-8")
    return folder


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


# -- claims


def test_claims_are_measured_until_there_is_enough(tmp_path, texts):
    script, out = load("claims"), tmp_path / "claims"
    words = ("run", "--on", f"x={texts}", "--out", out, "--ctx", "320,640", "--budgets", "64,full",
             "--new-tokens", "12", "--prompts", "6", "--dtype", "float32")  # fmt: skip
    alone = call(script, *words, "--enough", "12")
    first = (out / "prompts.jsonl").read_text().splitlines()[1:]
    words += ("--naive", POCKET / "drafter")  # joins later
    shown = call(script, *words, "--enough", "12")
    assert (out / "prompts.jsonl").read_text().splitlines()[1 : len(first) + 1] == first and alone != shown
    lines = (out / "prompts.jsonl").read_text().splitlines()
    written = [script.Text(**json.loads(line)) for line in lines[1:]]
    assert {t.cell for t in written} == {
        ("x", c, t, d, b) for c in (320, 640) for t in (0.0, 1.0) for d in ("drafter", "naive") for b in (64, "full")
    }
    clean = script.clean_tokens(written)
    assert min(clean.values()) >= 12 and len({t.index for t in written}) < 6, "it stopped when there was enough"
    ends = {(t.index, t.context): t.source for t in written}
    assert all(ends[n, 320] == ends[n, 640] for n, _ in ends)
    greedy = [t for t in written if t.temperature == 0]
    for t in greedy:  # greedy text does not depend on who drafts
        same = [u for u in greedy if (u.index, u.context) == (t.index, t.context)]
        assert len({(u.tokens, u.clean) for u in same}) == 1
    assert "full - 64 at 640" in shown and "320 - 640 at budget 64" in shown and "context is worth" in shown
    worth = json.loads((out / "worth.json").read_text())
    ((rows,),) = ([*x.values()] for x in worth.values())
    assert len(rows) == 6 and {r["tokens"] for r in rows} == {384} and all(r["loss"] > 0 for r in rows)
    (out / "worth.json").write_text(json.dumps({key: {"x": rows[:4]} for key in worth}))  # as stopped after four
    (out / "prompts.jsonl").write_text("\n".join(lines[:-3]) + '\n{"dataset": "x", "sou')  # as after kill -9
    assert call(script, *words, "--enough", "12") == shown
    assert (out / "prompts.jsonl").read_text().splitlines() == lines
    with pytest.raises(script.UserError, match="measured with other models"):
        call(script, *words, "--gamma", "3")
    with pytest.raises(script.UserError, match="measured with other models"):
        call(script, *words[:-1], POCKET / "target")
    (out / "prompts.jsonl").write_text('{"key": "of an earlier version"}\n')
    with pytest.raises(script.UserError, match="measured with other models"):
        call(script, *words)


def test_claims_of_two_processes_are_those_of_one(tmp_path, texts):
    words = ("--on", f"x={texts}", "--ctx", "320,640", "--budgets", "64,full", "--temperatures", "0", "--prompts", "2",
             "--new-tokens", "12", "--dtype", "float32")  # fmt: skip
    found = []
    for jobs in (1, 2):
        out = tmp_path / str(jobs)
        command = [sys.executable, SCRIPTS / "claims.py", "run", *words, "--out", out, "--jobs", str(jobs)]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        lines = (out / "prompts.jsonl").read_text().splitlines()
        found.append((shown.splitlines()[:6], lines[0], sorted(lines[1:])))
    assert found[0] == found[1] and len(found[0][2]) == 2 * 2 * 2


def test_bounds_of_the_claims():
    script = load("claims")

    def text(n, context, budget, accepted, drafter="drafter", temperature=0.0):
        counts = {"tokens": 200, "clean": 150, "drafted": 100, "rounds": 40, "drafted_in_all": 0, "accepted_in_all": 0}
        return script.Text("x", f"book{n}@{9}", n, context, temperature, drafter, budget, accepted=accepted, **counts)

    texts = [
        text(n, c, b, a + n % 3)
        for n in range(12)
        for c in (4096, 16384)
        for b, a in ((256, 60 - 20 * (c > 5000)), ("full", 61))
    ]
    found = {f.what: f for f in script.falls(texts)}
    near, far = found["full - 256 at 4096"], found["4096 - 16384 at budget 256"]
    assert near.value == pytest.approx(0.01) and near.verdict(1800) == "holds"
    assert near.clean == 1800 and near.verdict(1801) == "too few tokens"
    assert found["full - 256 at 16384"].verdict(1800) == "does not hold"
    assert (far.value, far.upper) == pytest.approx((0.20, 0.20)) and far.verdict(1800) == "does not hold"
    alone = [text(n, 4096, 256, 5) for n in range(12, 20)]  # after prompts that no other cell has
    assert {f.what: f for f in script.falls(texts + alone)} == found
    assert not any("naive" in what for what in found)
    rival = [text(n, c, b, 62, "naive") for n in range(12) for c in (4096, 16384) for b in (256, "full")]
    shown = script.report(texts + rival, [], 5000)
    assert "does not yet test the claim" in shown and "(too few)" in shown
    rival = [replace(t, accepted=40) if t.budget == 256 else t for t in rival]
    assert "does not yet test" not in script.report(texts + rival, [], 5000)
    noisy = [text(n, 4096, b, (50 + 40 * (n % 2)) if b == 256 else 71) for n in range(12) for b in (256, "full")]
    assert next(script.falls(noisy)).verdict(1000) == "not shown"


def test_what_a_context_is_worth():
    script = load("claims")

    def row(gains, dataset="x"):
        rows = list(script.worth_rows([script.Worth(dataset, f"b{n}@1", 16384, 1024, 3, 3 + g) for n, g in gains]))
        return [cell.strip() for cell in rows[3].split("|")[1:-1]]

    assert " ".join(row([(n, 0.08) for n in range(9)])) == "x 16384 9 3.000 3.080 +0.080 +0.080 0.05 holds"
    assert row([(n, 0.04) for n in range(9)])[-1] == "does not hold"
    noisy = [(n, 0.3 * (n % 3 == 0) - 0.04) for n in range(9)]
    assert row(noisy)[5] == "+0.060" and row(noisy)[-1] == "not shown"
    assert row([(n % 4, 0.08) for n in range(9)])[6:] == ["", "0.05", ""], "no bound from four documents"
    both = [script.Worth(d, f"b{n}@1", 16384, 1024, 3, 3 + g) for d, g in (("x", 0.02), ("y", 0.1)) for n in range(6)]
    assert [line.split(" | ")[0] for line in script.worth_rows(both)][3:] == ["| x", "| y", "| all"]
    assert list(script.worth_rows(both))[-1].split(" | ")[5] == "+0.060"


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
