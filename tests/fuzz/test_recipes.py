"""Recipes: any text and any setting gives a recipe of finite numbers, or one UserError."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from bdcli.base.errors import UserError
from bdcli.config.bench import BenchRecipe
from bdcli.config.distill import DistillRecipe
from bdcli.config.loader import as_dict, explain, load_recipe
from bdcli.config.pretrain import PretrainRecipe
from tests.support.fuzz import JSON, WORDS, fuzz, mutated

RECIPES = {p: p.read_bytes() for p in sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))}
SCHEMAS = st.sampled_from([DistillRecipe, PretrainRecipe, BenchRecipe])
KEYS = sorted({row[0].partition(" = ")[0] for s in (DistillRecipe, PretrainRecipe, BenchRecipe) for row in explain(s)})
VALUES = st.one_of(
    WORDS,
    JSON.map(lambda value: json.dumps(value)),
    JSON.map(lambda value: yaml.safe_dump(value, default_flow_style=True)),
    st.sampled_from([".inf", "1e400", "!!int x", "&a [*a]", "*b", "{<<: 1}", "0x_", "1:99", "=", "!!omap [1]", "? a"]),
    st.integers(20, 6000).map("9".__mul__),
)
SETTINGS = st.tuples(st.sampled_from(KEYS) | WORDS, VALUES).map("=".join)


def outcome(path, schema, settings=()):
    """The recipe, or None where it was refused."""
    try:
        recipe = load_recipe(path, schema, list(settings))
    except UserError as error:
        assert str(error) and max(map(len, str(error).splitlines())) < 2000
        return None
    json.dumps(as_dict(recipe), allow_nan=False)
    return recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes") / "r.yaml"


@fuzz(150)
@given(SCHEMAS, st.sampled_from(list(RECIPES.values())).flatmap(mutated))
def test_an_edited_recipe_loads_or_is_refused(place, schema, body):
    place.write_bytes(body)
    outcome(place, schema)


@fuzz(150)
@given(SCHEMAS, st.dictionaries(st.sampled_from([*KEYS, "extends"]), VALUES, min_size=1, max_size=4))
@example(DistillRecipe, {"extends": "9" * 4000})
@example(DistillRecipe, {"extends": "a/" * 1900 + "b"})
def test_a_recipe_of_any_values_loads_or_is_refused(place, schema, values):
    lines = []
    for key, value in values.items():
        *parents, last = key.split(".")
        lines.append("".join(f"{'  ' * n}{parent}:\n" for n, parent in enumerate(parents)))
        lines.append(f"{'  ' * len(parents)}{last}: {value}\n")
    place.write_bytes("".join(lines).encode("utf-8", "surrogatepass"))
    outcome(place, schema)


@fuzz(200)
@given(SCHEMAS, st.lists(SETTINGS, min_size=1, max_size=3))
@example(DistillRecipe, ["data.context.x=5"])
def test_settings_of_any_text_are_taken_or_refused(schema, settings):
    outcome(None, schema, settings)
