"""Numbers, names and YAML of recipes: every bad one is a line of one UserError, whatever is wrong with it."""

import itertools
import re
from dataclasses import fields, is_dataclass
from typing import get_type_hints

import pytest

from bdcli.base.errors import UserError
from bdcli.config.bench import BenchRecipe
from bdcli.config.distill import DistillRecipe
from bdcli.config.loader import load_recipe
from bdcli.config.pretrain import PretrainRecipe

SCHEMAS = (DistillRecipe, PretrainRecipe, BenchRecipe)


def numbers(schema, prefix=""):
    """Dotted keys of all settings that take a number or several."""
    for f in fields(schema):
        hint = get_type_hints(schema)[f.name]
        if is_dataclass(hint):
            yield from numbers(hint, f"{prefix}{f.name}.")
        elif kinds := re.findall(r"\b(int|float)\b", hint.__name__ if isinstance(hint, type) else str(hint)):
            yield f"{prefix}{f.name}", "float" in kinds


NUMBERS = [(schema, key, fraction) for schema in SCHEMAS for key, fraction in numbers(schema)]
NOT_FINITE = [".inf", "-.inf", ".nan", "1e400", "-1e400", "1.0e+400", "inf", "nan", "infinity", "9" * 400, "9" * 5000]
NO_NUMBERS = ["true", "no", "", "~x", "{a: 1}", "[[1]]", "2024-01-01", "2024-13-45", "1 2", "one", "!!int x", "!x 1"]


def problem(schema, *overrides):
    with pytest.raises(UserError) as found:
        load_recipe(None, schema, list(overrides))
    return str(found.value)


@pytest.mark.parametrize(("schema", "key", "fraction"), NUMBERS, ids=[f"{s.__name__}.{k}" for s, k, _ in NUMBERS])
def test_every_number_is_finite_and_a_number(schema, key, fraction):
    for text in NOT_FINITE:
        said = problem(schema, f"{key}={text}")
        assert f"{key} must be " in said and len(said) < 500, said
        assert not fraction or "number" in said
    for text in NO_NUMBERS:
        assert f"{key} must be " in problem(schema, f"{key}={text}"), text
    for text in ("9223372036854775808", "-9223372036854775808", "1" * 30) if not fraction else ():
        assert "2^63" in problem(schema, f"{key}={text}")


@pytest.mark.parametrize("schema", SCHEMAS)
def test_seeds_are_those_that_generators_take(schema):
    for seed in (0, 1, 2**63 - 1):
        assert load_recipe(None, schema, [f"seed={seed}"]).seed == seed
    for seed in (-1, -(2**63), 2**63, 10**23):
        assert "2^63" in problem(schema, f"seed={seed}")
    for seed in ("1.5", "1e3", "'5'", "true", "null", "[1]"):
        assert "seed must be a whole number" in problem(schema, f"seed={seed}")


def test_numbers_that_yaml_takes_for_text_are_read(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("optimizer: {lr: 1e-4, weight_decay: '2.5E-1', steps: 1_000, clip: 3}\n")
    o = load_recipe(path, DistillRecipe, ["views={budgets: [40, 0x64], weights: [1e0, 1]}"]).optimizer
    assert (o.lr, o.weight_decay, o.steps, o.clip) == (1e-4, 0.25, 1000, 3.0)
    assert [type(value) for value in (o.lr, o.weight_decay, o.steps, o.clip)] == [float, float, int, float]


NAMES = ["1.10", "010", "1_000", "0x10", "1e3", "1:30", "2024-01-01", "2024-13-45", "1" * 5000]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_looks_like_a_number_stays_as_it_is_written(name, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(f"target: {name}\ndata: {{sources: [{name}, b]}}\n")
    recipe = load_recipe(path, DistillRecipe, [f"drafter={name}"])
    assert recipe.target == recipe.drafter == recipe.data.sources[0] == name and type(recipe.target) is str


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 1\ndata: [1\n", 3),
        ("seed: 1\n\tdata: 2\n", 2),
        ("seed: !!python/object:os.system x\n", 1),
        ("seed: 1\ntarget: !mine x\n", 2),
        ("seed: 1\nlayers: !!bool x\n", 2),
        ("seed: 1\nlayers: !!map x\n", 2),
        ("seed: 1\ntarget: !!binary é\n", 2),
        ("seed: *nobody\n", 1),
        ("seed: 1\ntarget: a\0b\n", 2),
        ("seed: 1\ndata: {sources: [{[1]: 2}]}\n", 2),
        ("seed: 1\ndata: {sources: &x [*x]}\n", 2),
        ("seed: 1\n---\nseed: 2\n", 2),
        ("seed: '1\n", 2),
        ("seed: 1\n? [a, b]\n: 2\n", 2),
        ("%YAML 9\nseed: 1\n", 1),
    ],
)
def test_yaml_that_is_wrong_is_named_with_its_line(text, line, tmp_path, cli):
    path = tmp_path / "r.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(UserError) as found:
        load_recipe(path, DistillRecipe)
    assert f"{path}:{line}: " in str(found.value), str(found.value)
    done = cli("distill", path, "--dry-run")
    assert done.code == 2 and f"{path}:{line}: " in done.err


PAIRS = list(itertools.pairwise("abcdefghijklmnopqrstuvwxyz"))
BOMB = "a: &a {x: 1}\n" + "".join(f"{new}: &{new} {{l: *{old}, r: *{old}}}\n" for old, new in PAIRS)
LISTS = "a: &a [x]\n" + "".join(f"{new}: &{new} [*{old}, *{old}]\n" for old, new in PAIRS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "more than 10000 entries"),
        (LISTS + "seed: *v\n", "seed must be a whole number"),
        ("a: &x {b: *x}\n", "nested too deeply"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("a: " + "{a: " * 3000 + "}" * 3000, "nested too deeply"),
        ("- 1\n", "is not a mapping"),
        ("", "is not a mapping"),
        ("just text", "is not a mapping"),
    ],
    ids=["mappings", "lists", "circle", "deep lists", "deep mappings", "list", "empty", "text"],
)
def test_trees_that_never_end_are_refused_at_once(text, said, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError) as found:
        load_recipe(tmp_path / "r.yaml", DistillRecipe)
    assert said in str(found.value) and max(map(len, str(found.value).splitlines())) < 1000


@pytest.mark.parametrize("base", ["[a]", "{a: 1}", "null", "'a\\0b'", "5", "''", "x" * 300, ".", "r.yaml", "loop.yaml"])
def test_what_a_recipe_extends_is_a_recipe(base, tmp_path):
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "r.yaml").write_text(f"extends: {base}\n" if "\\0" not in base else 'extends: "a\\0b"\n')
    if base == "null":
        assert load_recipe(tmp_path / "r.yaml", DistillRecipe) == DistillRecipe()
        return
    with pytest.raises(UserError):
        load_recipe(tmp_path / "r.yaml", DistillRecipe)


def test_values_are_shown_as_they_were_given(tmp_path):
    said = problem(DistillRecipe, "data.context.x=5")
    assert said == (
        "1 error in the options\n  --set data.context.x=5: data.context must be a whole number, not {'x': 5}"
    )
    assert "not {'x': {'y': [1, 'a']}}" in problem(DistillRecipe, "data.context={x: {y: [1, a]}}")
    (tmp_path / "r.yaml").write_text("seed: 1\ndata: {context: 512}\n")
    with pytest.raises(UserError) as found:
        load_recipe(tmp_path / "r.yaml", DistillRecipe, ["data.context.x.y=5", "seed={a: 1}"])
    assert "--set data.context.x.y=5: data.context must be a whole number, not {'x': {'y': 5}}" in str(found.value)
    assert "--set seed={a: 1}: seed must be a whole number, not {'a': 1}" in str(found.value)
    (tmp_path / "b.yaml").write_text("datasets: {a: {b: {c: 1}}}\narms: {x: {gamma: {y: 1}}}\n")
    with pytest.raises(UserError) as found:
        load_recipe(tmp_path / "b.yaml", BenchRecipe)
    assert "not {'b': {'c': 1}}" in str(found.value) and "not {'y': 1}" in str(found.value)
    assert str(tmp_path) not in str(found.value).partition("must be")[2].splitlines()[0]


def test_empty_lists_that_a_run_cannot_do_without_are_named():
    assert "data.sources: must name at least one" in problem(DistillRecipe, "data.sources=[]")
    assert "corpus.sources: must name at least one" in problem(PretrainRecipe, "corpus.sources=[]")
    assert "held_out.contexts: must be" in problem(PretrainRecipe, "held_out.contexts=[]")
    assert "evaluation.contexts: must be" in problem(DistillRecipe, "evaluation.contexts=[]")
    assert "datasets.a: must name at least one" in problem(BenchRecipe, "datasets={a: []}")
    assert "datasets.a must be a list" in problem(BenchRecipe, "datasets={a: [{b: 1}]}")
