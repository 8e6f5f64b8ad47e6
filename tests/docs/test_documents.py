"""What the documents say is true."""

import importlib.util
import re
from pathlib import Path

import pytest
import typer

from bdcli.cli.main import app
from bdcli.config.bench import BenchRecipe
from bdcli.config.loader import load_recipe

ROOT = Path(__file__).parents[2]
COMMANDS = typer.main.get_command(app).commands
README = (ROOT / "README.md").read_text("utf-8")


def options(command):
    return {flag for parameter in COMMANDS[command].params for flag in parameter.opts}


def shown_commands():
    texts = [README, (ROOT / "Makefile").read_text("utf-8"), (ROOT / "CONTRIBUTING.md").read_text("utf-8")]
    return sorted({line for text in texts for line in re.findall(r"bdcli ([a-z]+ [^\n#`]*)", text)})


@pytest.mark.parametrize("line", shown_commands())
def test_every_command_shown_exists(line):
    name, *words = line.split()
    assert name in COMMANDS
    assert {w.split("=")[0] for w in words if re.match(r"--[a-z]", w)} <= options(name)


def test_readme_explains_only_options_that_exist():
    shown = set(re.findall(r"`(--[a-z-]+)", README))
    assert len(shown) > 8
    assert shown <= set().union(*(options(c) for c in COMMANDS)) | {"--json"}


def test_make_targets_shown_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    for document in ("README.md", "CONTRIBUTING.md"):
        assert set(re.findall(r"\bmake ([a-z-]+)\b(?=[ `\n])", (ROOT / document).read_text("utf-8"))) <= targets | {
            "and"
        }


def test_readme_and_results_equal_the_store():
    spec = importlib.util.spec_from_file_location("results", ROOT / "scripts" / "results.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    main, repeats, published = script.load()
    recipe = load_recipe(ROOT / "recipes" / "bench_pocket.yaml", BenchRecipe)
    assert {(r.context, r.arm) for r in main} == {(c, arm) for c in recipe.contexts for arm in recipe.arms}
    assert len(repeats) >= 6
    assert script.PAGE.read_text("utf-8") == script.results_page(main, repeats, published)
    assert README.split(script.BEGIN)[1].split(script.END)[0].strip() == script.readme_table(main)
    assert script.DB.stat().st_size < 600_000


def test_assets_stay_light_and_are_described():
    pocket = ROOT / "bdcli" / "assets" / "pocket"
    assert sum(p.stat().st_size for p in pocket.rglob("*") if p.is_file()) < 28e6
    for role in ("target", "drafter"):
        card = (pocket / role / "README.md").read_text("utf-8")
        assert all(word in card for word in ("parameters", "data", "held out", "licence"))
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")
