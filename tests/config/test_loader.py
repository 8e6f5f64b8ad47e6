"""Recipes: all of ours load, and a bad one gets every error at once with its line and the nearest name."""

import json
import re
import shutil
from pathlib import Path

import pytest

from bdcli.base.errors import UserError
from bdcli.config.bench import BenchRecipe
from bdcli.config.distill import DistillRecipe
from bdcli.config.loader import as_dict, explain, load_recipe
from bdcli.config.pretrain import PretrainRecipe

ROOT = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(ROOT.rglob("*.yaml"))
SCHEMAS = {"distill": DistillRecipe, "pretrain": PretrainRecipe}
HERE = ["target=pocket", "drafter=pocket", "data.sources=[stdlib]"]


def elsewhere(path):
    """What stands in for settings that name what is not on every machine."""
    if path.stem in ("pocket_target", "pocket_start"):
        return ["corpus.sources=[stdlib, recall]", "corpus.weights=[]", "held_out.sources=[]"]
    return HERE if path.parent.name == "paper" or path.stem in ("pocket_drafter", "pocket_short") else []


def command_of(path):
    """The command that a recipe's head tells to run it with."""
    head = path.read_text("utf-8").partition("\n\n")[0]
    assert head.startswith("#")
    return re.search(rf"bdcli (\w+) recipes/{path.relative_to(ROOT)}", path.read_text("utf-8"))[1]


@pytest.mark.parametrize("path", [p for p in RECIPES if command_of(p) in SCHEMAS], ids=lambda p: p.stem)
def test_every_recipe_loads_and_prints_its_plan(path, cli, tmp_path):
    assert load_recipe(path, SCHEMAS[command_of(path)])
    words = [word for setting in elsewhere(path) for word in ("--set", setting)]
    if command_of(path) == "pretrain":
        words += ["--max-minutes", 1]
    plan = cli(command_of(path), path, "--dry-run", "--out", tmp_path / "run", *words)
    assert plan.code == 0 and all(said in plan.err for said in ("memory about", "disk", "about", " here")), plan.err


def write(folder, text, name="r.yaml"):
    (folder / name).write_text(text, "utf-8")
    return folder / name


def errors(folder, text, overrides=()):
    with pytest.raises(UserError) as caught:
        load_recipe(write(folder, text), DistillRecipe, list(overrides))
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def test_all_errors_come_at_once_with_line_and_nearest_name(tmp_path):
    lines = errors(
        tmp_path,
        "target: pocket\noptimiser:\n  lr: 1e-3\ndata:\n  contxt: 99\n  windows: many\nviews:\n  mode: sandwhich\n"
        "loss: 3\nevaluation:\n  budgets: [256, all]\n",
    )
    assert lines == [
        "6 errors in r.yaml",
        "  r.yaml:2: unknown key optimiser; did you mean optimizer?",
        "  r.yaml:5: unknown key data.contxt; did you mean data.context?",
        "  r.yaml:6: data.windows must be a whole number, not 'many'",
        "  r.yaml:8: views.mode must be one of sandwich, sampled, full (did you mean sandwich?), not 'sandwhich'",
        "  r.yaml:9: loss must be a mapping, not 3",
        "  r.yaml:11: evaluation.budgets must be a list of a whole number or one of full, not [256, 'all']",
    ]


def test_values_that_do_not_fit_together_are_all_named(tmp_path):
    lines = errors(
        tmp_path,
        "data:\n  context: 512\n  written: 2\nviews:\n  budgets: [8, 2048]\n  weights: [3, -1]\n"
        "loss:\n  sparse_weight: -1\n",
        ["optimizer.steps=0", "evaluation.patience=0"],
    )
    assert lines[0] == "7 errors in r.yaml"
    for expected in (
        "r.yaml:5: views.budgets: must be at least 22 each",
        "r.yaml:5: views.budgets: must lie below data.context (512)",
        "r.yaml:6: views.weights: must be 2 non-negative numbers",
        "r.yaml:8: loss.sparse_weight: must not be negative",
        "r.yaml:3: data.written: must lie in 0 .. 1",
        "--set optimizer.steps=0: optimizer.steps: must be above 0",
        "--set evaluation.patience=0: evaluation.patience: must be above 0",
    ):
        assert any(expected in line for line in lines), expected


def test_extends_and_set_in_order_of_precedence(tmp_path):
    write(tmp_path, "seed: 1\noptimizer:\n  lr: 1e-4\n  steps: 7\n", "base.yaml")
    path = write(tmp_path, "extends: base.yaml\noptimizer:\n  steps: 8\n")
    recipe = load_recipe(path, DistillRecipe, ["optimizer.clip=2", "data.sources=[a, b]", "drafter=some/folder"])
    assert (recipe.seed, recipe.optimizer.lr, recipe.optimizer.steps, recipe.optimizer.clip) == (1, 1e-4, 8, 2.0)
    assert recipe.data.sources == ("a", "b") and recipe.drafter == "some/folder"
    assert as_dict(recipe)["optimizer"]["steps"] == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "not valid YAML"),
        ("- 1\n", "not a mapping"),
        ("", "not a mapping"),
        ("extends: r.yaml\n", "extends itself"),
        ("extends: gone.yaml\n", "does not exist"),
        ("seed: 1\nseed: 2\n", "seed is given twice"),
    ],
)
def test_broken_files(tmp_path, text, message):
    assert message in "\n".join(errors(tmp_path, text))


def test_a_bad_recipe_gets_all_its_errors_at_once(tmp_path, cli):
    """Wrong keys and types, values that do not fit, and what is not on this machine: one message, a line each."""
    from bdcli.model.hub import POCKET

    other = tmp_path / "other"
    shutil.copytree(POCKET / "drafter", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text("utf-8"))
    tokens = list(tokenizer["model"]["vocab"].items())
    (a, i), (b, j) = tokens[300], tokens[301]
    tokenizer["model"]["vocab"] |= {a: j, b: i}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    path = write(
        tmp_path,
        f"drafter: {other}\ndata:\n  sources: [nowhere.txt]\n  contxt: 9\n  windows: many\nviews:\n"
        "  budgets: [256, 9000]\nloss:\n  sparse_weight: -1\n",
    )
    found = cli("distill", path, "--dry-run")
    lines = [line.strip().replace(f"{tmp_path}/", "") for line in found.err.splitlines()]
    assert found.code == 2 and "6 errors in r.yaml" in lines[0]
    wanted = (
        "r.yaml:1: drafter: drafter other has another vocabulary",
        "r.yaml:3: data.sources: data source nowhere.txt does not exist",
        "r.yaml:4: unknown key data.contxt; did you mean data.context?",
        "r.yaml:5: data.windows must be a whole number, not 'many'",
        "r.yaml:7: views.budgets: must lie below data.context (4096)",
        "r.yaml:9: loss.sparse_weight: must not be negative",
    )
    assert all(any(line.startswith(want) for line in lines) for want in wanted), lines
    gone = cli("distill", write(tmp_path, "target: ./gone\nextends: r.yaml\n", "s.yaml"), "--dry-run")
    assert gone.code == 2 and "s.yaml:1: target: --target ./gone: no such folder" in gone.err


def test_material_made_for_other_models_is_one_of_the_errors(tmp_path, cli):
    from bdcli.model.hub import POCKET
    from bdcli.train.distill.checks import passages_key, window_dependencies

    folders = POCKET / "target", POCKET / "drafter"
    data = tmp_path / "run" / "data"
    data.mkdir(parents=True)
    parts = window_dependencies(DistillRecipe(), *folders) | {"target": "another", "dtype": "torch.float32"}
    (data / "manifest.json").write_text(json.dumps({"parts": parts}))
    (data / "passages.json").write_text(json.dumps({"key": passages_key(DistillRecipe(), folders[0])}))
    path = write(tmp_path, "target: pocket\nloss:\n  sparse_weight: -1\nseed: 1\n")
    found = cli("distill", path, "--dry-run", "--out", tmp_path / "run")
    lines = [line.strip().replace(f"{tmp_path}/", "") for line in found.err.splitlines()]
    assert found.code == 2 and "3 errors in r.yaml" in lines[0]
    assert any(
        line.startswith("r.yaml:1: target: run/data/manifest.json was made for another target") for line in lines
    )
    assert any(line.startswith("r.yaml:4: seed: run/data/manifest.json was made for another seed") for line in lines)
    (data / "manifest.json").write_text("torn")
    torn = cli("distill", path, "--dry-run", "--out", tmp_path / "run")
    assert torn.code == 2 and "manifest.json is damaged" in torn.err and (data / "manifest.json").read_text() == "torn"
    (data / "manifest.json").unlink()
    other = cli("distill", write(tmp_path, "evaluation:\n  gamma: 3\n", "e.yaml"), "--dry-run", "--data", data)
    assert other.code == 2 and "e.yaml:1: evaluation: " in other.err and "passages.json was made for" in other.err


def test_every_setting_has_a_meaning():
    for schema in SCHEMAS.values():
        rows = explain(schema)
        assert len(rows) > 25 and all(meaning for _, meaning in rows)


def test_named_entries_are_strict_inside_and_may_be_replaced(tmp_path):
    from bdcli.config.bench import BenchRecipe

    path = tmp_path / "bench.yaml"
    path.write_text(
        "datasets: {a: stdlib, b: {c: 1}}\narms:\n  one: {method: bd, bugdet: 5}\n  two: 3\n  three: {gamma: x}\n"
    )
    with pytest.raises(UserError) as found:
        load_recipe(path, BenchRecipe)
    lines = str(found.value).splitlines()
    assert lines[0].startswith("4 errors in")
    wanted = (
        "datasets.b must be a list of text",
        "arms.one.bugdet; did you mean arms.one.budget?",
        "arms.two must be a mapping",
    )
    assert all(any(want in line for line in lines) for want in (*wanted, "arms.three.gamma must be"))
    assert f"{path}:3" in str(found.value)
    path.write_text("arms:\n  one: {method: bd, budget: 256}\n  two: {method: official}\n")
    with pytest.raises(UserError, match=r"yaml:3: arms\.two\.budget: official needs a budget"):
        load_recipe(path, BenchRecipe)
    recipe = load_recipe(path, BenchRecipe, ["arms={x: {method: lookup, gamma: 4}}"])
    assert list(recipe.arms) == ["ar", "x"] and recipe.arms["x"].gamma == 4
    assert load_recipe(None, BenchRecipe, ["samples=2"]).samples == 2
    with pytest.raises(UserError, match="--set sampels=2: unknown key sampels; did you mean samples"):
        load_recipe(None, BenchRecipe, ["sampels=2"])


@pytest.mark.parametrize("seed", [-1, 2**63, 10**23])
@pytest.mark.parametrize("schema", [DistillRecipe, PretrainRecipe, BenchRecipe])
def test_a_seed_that_no_generator_takes_is_refused(schema, seed):
    with pytest.raises(UserError, match=r"seed:? must (lie in 0 \.\. 2\^63-1|be a whole number below 2\^63)"):
        load_recipe(None, schema, [f"seed={seed}"])


@pytest.mark.parametrize("value", ["1e-46", "1e300", ".nan", "-1", ".inf"])
@pytest.mark.parametrize("key", ["temperature", "loss.temperature"])
def test_a_temperature_that_losses_cannot_divide_by_is_refused(key, value):
    with pytest.raises(UserError, match=f"{key}:? must"):
        load_recipe(None, DistillRecipe, [f"{key}={value}"])
