"""The imports of the packages run one way, and files, folders and functions stay small."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import util
from pathlib import Path

ROOT = Path(__file__).parents[1]

# A package imports from those before it only.
LAYERS = (
    "base",
    "model",
    "cache",
    "config",
    "speculation",
    "backends",
    "data",
    "results",
    "decode",
    "train",
    "bench",
    "cli",
)
MAX_MODULES = 18  # of a package folder
MAX_LINES, MAX_TEST_LINES = 350, 450  # of a file
MAX_FUNCTION_LINES, MAX_PARAMETERS = 60, 8  # of a function

# Functions that may be larger, and why. Typer commands are left out by their annotations: an option is a parameter.
LARGER = {
    "bdcli/backends/cpu/": "compiled code: structs cannot be passed between machine functions, and calls cost",
    "kernels/bd_kernels/": "Triton kernels take a pointer, a stride and a size for each tensor",
}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Dotted names of `bdcli` modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bdcli":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "bdcli")


def test_packages_import_one_way():
    level = {package: i for i, package in enumerate(LAYERS)}
    assert {p.name for p in (ROOT / "bdcli").iterdir() if (p / "__init__.py").exists()} == set(LAYERS)
    for path in sources("bdcli"):
        package = path.relative_to(ROOT / "bdcli").parts[0]
        for name in imported(path):
            used = name.split(".")[1]
            if used.startswith("__"):
                continue
            assert package == "__main__.py" or level[used] <= level[package], f"{path} imports {name}"


def test_kernels_know_nothing_of_the_product():
    for path in sources("kernels"):
        assert not list(imported(path)), path


def test_no_module_is_left_at_the_top():
    assert {p.name for p in (ROOT / "bdcli").glob("*.py")} == {"__init__.py", "__main__.py"}


def test_folders_hold_few_modules():
    for folder in {path.parent for path in sources("bdcli")}:
        assert len([p for p in folder.glob("*.py") if p.name != "__init__.py"]) <= MAX_MODULES, folder


def product_files() -> list[Path]:
    return [path for folder in ("bdcli", "kernels", "scripts") for path in sources(folder)]


def test_files_stay_small():
    for path in product_files():
        assert len(path.read_text("utf-8").splitlines()) <= MAX_LINES, path
    for path in sources("tests"):
        assert len(path.read_text("utf-8").splitlines()) <= MAX_TEST_LINES, path


def is_command(function: ast.FunctionDef) -> bool:
    """Typer's commands have annotated options."""
    return any("typer." in ast.unparse(a.annotation) for a in function.args.args if a.annotation is not None)


def test_functions_stay_small():
    for path in product_files():
        name = str(path.relative_to(ROOT))
        if any(name.startswith(place) for place in LARGER):
            continue
        for function in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(function, ast.FunctionDef) or is_command(function):
                continue
            a = function.args
            parameters = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
            count = len(parameters) - (parameters[:1] in (["self"], ["cls"])) + bool(a.vararg) + bool(a.kwarg)
            lines = function.end_lineno - function.lineno + 1
            assert lines <= MAX_FUNCTION_LINES and count <= MAX_PARAMETERS, f"{name}:{function.lineno} {function.name}"


def test_views_and_drafters_answer_for_themselves():
    """Nothing asks which kind of view, selection or drafter it has; only their own modules may."""
    asked = re.compile(r"isinstance\([^)]*\b(View|FullView|OfficialView|Full|Window|Chunk|Official|Selection)\b")
    for path in product_files():
        if path.parent.name == "cache" and path.stem in ("view", "selection"):
            continue
        text = path.read_text("utf-8")
        assert not asked.search(text), path
        assert not re.search(r"hasattr\([^)]*(drafter|cache|runner)", text), path


def test_an_installed_package_is_whole():
    """pyproject names every folder that holds modules; an editable install would hide that one is missing."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    here = {".".join(p.parent.relative_to(ROOT).parts) for p in sources("bdcli")}
    assert here | {"bd_kernels"} <= set(named)


def test_transformers_still_finds_its_own_kernels_integration():
    """A top-level package called `kernels` would shadow the one transformers looks for."""
    assert "bd_kernels" in sys.modules or util.find_spec("bd_kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()
    from transformers.integrations import hub_kernels

    assert hub_kernels.__name__.startswith("transformers")
