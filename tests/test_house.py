"""What the documents say is true, and the house keeps its shape."""

import ast
import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from bdcli.bench.bench_recipe import BenchRecipe
from bdcli.cli import app
from bdcli.recipe import load_recipe

ROOT = Path(__file__).parent.parent
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


# A module may import only from rooms above its own line; a package lists its rooms with their dots.
ORDER = [
    ["errors"],
    ["config", "options", "bench.published", "metrics", "text", "interrupt", "views", "recipe", "flags", "provenance"],
    ["terminal", "devices"],
    ["train.settings", "train.recall", "train.files", "train.ranks"],
    ["rope", "select", "store", "prompts", "sampling", "controller", "train.losses", "bench.lookup"],
    ["train.distill_recipe", "train.pretrain_recipe"],
    ["model", "train.data", "bench.bench_recipe"],
    ["bench.cells", "bench.samples", "memory"],
    ["bench.gates", "bench.paper"],
    ["report"],
    ["plots"],
    ["page"],
    ["cache", "checkpoint", "train.view_forward", "train.optimizers", "train.corpus"],
    ["train.scratch", "train.trainer", "budget_cache", "convert", "train.held_out", "train.memory", "train.copying"],
    ["train.estimate"],
    ["speculate", "train.acceptance", "cpu.code", "gpu.ops", "gpu.capture", "gpu.support"],
    ["gpu.program", "gpu.caches"],
    ["gpu.reader"],
    ["cpu.simd", "cpu.support"],
    ["cpu.layout", "cpu.micro"],
    ["cpu.tiles"],
    ["cpu.choice"],
    ["cpu.rows", "cpu.draws", "cpu.threads"],
    ["cpu.attention"],
    ["cpu.step"],
    ["cpu.memory"],
    ["cpu.pool", "cpu.caches"],
    ["cpu.reader"],
    ["engine"],
    ["baseline"],
    ["decode", "doctor"],
    ["train.writing", "train.checks"],
    ["train.prepare", "runs"],
    ["train.plan"],
    ["train.distill", "train.pretrain"],
    ["train.runs", "bench.outcome"],
    ["train.commands", "bench.peers"],
    ["bench.methods", "bench.shapes"],
    ["bench.matrix"],
    ["bench.commands"],
    ["cli"],
    ["__main__"],
]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("bdcli"):
            module = node.module.removeprefix("bdcli").removeprefix(".")
            package = not module or (ROOT / "bdcli" / module.replace(".", "/")).is_dir()
            rooms = [f"{module}.{alias.name}".lstrip(".") for alias in node.names] if package else [module]
            yield from (room for room in rooms if not room.startswith("__"))


def test_data_flows_one_way_and_files_stay_small():
    level = {room: i for i, rooms in enumerate(ORDER) for room in rooms}
    for path in sorted((ROOT / "bdcli").rglob("*.py")):
        room = ".".join(path.relative_to(ROOT / "bdcli").with_suffix("").parts)
        if path.stem == "__init__":
            continue
        assert room in level, f"{room} is missing from ORDER"
        assert all(level[used] < level[room] for used in imports(path)), room
        assert len(path.read_text("utf-8").splitlines()) <= 380, room


def test_an_installed_package_is_whole():
    """pyproject names every folder that holds modules; an editable install would hide that one is missing."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    here = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "bdcli").rglob("*.py")}
    assert here | {"bd_kernels"} <= set(named)


def test_assets_stay_light_and_are_described():
    pocket = ROOT / "bdcli" / "assets" / "pocket"
    assert sum(p.stat().st_size for p in pocket.rglob("*") if p.is_file()) < 28e6
    for role in ("target", "drafter"):
        card = (pocket / role / "README.md").read_text("utf-8")
        assert all(word in card for word in ("parameters", "data", "held out", "licence"))
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")


def test_transformers_still_finds_its_own_kernels_integration():
    """A top-level package called `kernels` would shadow the one transformers looks for."""
    assert "bd_kernels" in sys.modules or importlib.util.find_spec("bd_kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()
    from transformers.integrations import hub_kernels

    assert hub_kernels.__name__.startswith("transformers")
