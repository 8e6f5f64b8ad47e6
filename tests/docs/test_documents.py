"""What the documents name exists, and what they claim equals the store and the program."""

import ast
import importlib
import importlib.util
import re

import pytest
import typer

from bdcli.cli.main import app
from bdcli.config.bench import Arm, BenchRecipe
from bdcli.config.distill import DistillRecipe
from bdcli.config.loader import explain, load_recipe
from bdcli.config.pretrain import PretrainRecipe
from tests.support.documents import PAGES, ROOT, code, page_id, spans, text_of

COMMANDS = typer.main.get_command(app).commands
README = text_of(ROOT / "README.md")
SECTIONS = ("data", "views", "loss", "optimizer", "evaluation", "corpus", "schedule", "held_out", "shape", "arms")
SETTINGS = {
    key.partition(" = ")[0]
    for schema, prefix in ((DistillRecipe, ""), (PretrainRecipe, ""), (BenchRecipe, ""), (Arm, "arms.NAME."))
    for key, _ in explain(schema, prefix)
}
ROOT_OPTIONS = {"--debug", "--version", "--help"}
each_page = pytest.mark.parametrize("page", PAGES, ids=page_id)


def options(command):
    return {flag for parameter in COMMANDS[command].params for flag in parameter.opts}


def commands_shown():
    """(page, command, rest of the line) of every command in the code of the documents and of the Makefile."""
    lines = [(page_id(page), line) for page in PAGES for line in code(page)]
    lines += [("Makefile", line) for line in text_of(ROOT / "Makefile").splitlines() if not line.startswith("#")]
    found = [(page, m) for page, line in lines for m in re.finditer(r"(?<![\w.\[])bdcli ([a-z]+)\b([^#\n]*)", line)]
    return sorted({(page, m[1], m[2]) for page, m in found})


@pytest.mark.parametrize(("page", "name", "rest"), commands_shown())
def test_every_command_shown_exists(page, name, rest):  # noqa: ARG001
    assert name in COMMANDS
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest)) <= options(name)


@each_page
def test_every_option_named_exists(page):
    known = set().union(*(options(c) for c in COMMANDS)) | ROOT_OPTIONS
    shown = {flag for line in code(page) for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", line)}
    assert shown <= known


def test_documents_explain_options():
    shown = {page: {f for line in code(page) for f in re.findall(r"--[a-z][a-z-]*", line)} for page in PAGES}
    assert len(shown[ROOT / "README.md"]) > 4 and len(set().union(*shown.values())) > 30


@each_page
def test_make_targets_shown_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.M))
    assert {m for line in code(page) for m in re.findall(r"^\$? ?make ([a-z-]+)", line)} <= targets


@each_page
def test_every_path_named_exists(page):
    named = spans(page)
    folders = [ROOT / s for s in named if s.endswith("/") and (ROOT / s).is_dir()]
    for span in named:
        if re.fullmatch(r"(\.ci|bdcli|kernels|scripts|recipes|tests|docs)/[\w./-]*", span):
            assert (ROOT / span).exists(), span
        elif re.fullmatch(r"\w+\.py", span):
            places = [p for folder in folders for p in folder.rglob(span)]
            assert places or not folders, f"{span} is in none of the folders that the page names"
            assert places or any(ROOT.glob(f"{top}/**/{span}") for top in ("bdcli", "kernels", "scripts")), span
    for line in code(page):
        for script in re.findall(r"python ([\w/]+\.py)", line):
            assert (ROOT / script).exists(), script
        for recipe in re.findall(r"\brecipes/[\w/]+\.yaml", line):
            assert (ROOT / recipe).exists(), recipe


@each_page
def test_every_module_named_exists(page):
    for line in code(page):
        for module in re.findall(r"(?:-m |\bfrom |\bimport )((?:bdcli|bd_kernels)[\w.]*)", line):
            assert importlib.util.find_spec(module), module
        for name in re.findall(r"^(bdcli\.[a-z][\w.]*)$", line):
            assert importlib.util.find_spec(name), name


def defined_names():
    """Names of functions, classes, fields and constants in the sources."""
    names = set()
    for path in (p for top in ("bdcli", "kernels", "scripts") for p in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names


@pytest.mark.parametrize(
    "page", [ROOT / f"docs/{n}.md" for n in ("architecture", "extending", "how-it-works")], ids=page_id
)
def test_functions_and_classes_named_exist(page):
    names = defined_names()
    for span in spans(page):
        if re.fullmatch(r"[A-Z][a-zA-Z]+[a-z](\.[a-z_]+)?|[a-z]+(_[a-z]+)+", span):
            assert set(span.split(".")) <= names, span


@each_page
def test_settings_of_recipes_named_exist(page):
    for line in code(page):
        for key in re.findall(rf"(?<![\w./-])((?:{'|'.join(SECTIONS)})(?:\.[a-z_]+)+)(?![\w./])", line):
            assert key in SETTINGS, key


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        place, _, anchor = target.partition("#")
        assert not place.startswith("http"), "the documents are complete in themselves"
        path = (page.parent / place).resolve() if place else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", text_of(path), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, target


@each_page
def test_pages_stay_short(page):
    lines = text_of(page).splitlines()
    assert len(lines) <= {"README.md": 100, "CONTRIBUTING.md": 60}.get(page.name, 130)
    assert max(map(len, lines)) <= 120


def test_every_page_can_be_reached_from_readme():
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached or page not in PAGES:
            continue
        reached.add(page)
        todo += [(page.parent / t.partition("#")[0]).resolve() for t in re.findall(r"\]\(([^)\s]+)\)", text_of(page))]
    assert reached == set(PAGES)


@pytest.fixture
def script(monkeypatch):
    """Loads a script by name."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module


def test_readme_and_results_equal_the_store(script):
    results = script("results")
    found = main, repeats, _ = results.load()
    recipe = load_recipe(ROOT / "recipes" / "bench_pocket.yaml", BenchRecipe)
    assert {(r.context, r.arm) for r in main} == {(c, arm) for c in recipe.contexts for arm in recipe.arms}
    assert len(repeats) >= 6
    pages = results.pages(*found)
    assert {"results.md", "results-cells.md", "results-memory.md", "results-paper.md"} <= set(pages)
    for name, text in pages.items():
        assert text_of(results.DOCS / name) == text, name
    assert README.split(results.BEGIN)[1].split(results.END)[0].strip() == results.readme_table(main)
    assert results.DB.stat().st_size < 600_000


def test_claims_equal_the_archive(script):
    results = script("results")
    page = results.claims_page(*results.read_archive(results.CLAIMS))
    assert text_of(results.DOCS / "claims.md") == page


def test_reference_of_commands_and_recipes_equals_the_program(script):
    pages = script("cli_reference").pages()
    written = {p for folder in ("docs/cli", "docs/recipes") for p in (ROOT / folder).glob("*.md")}
    assert set(pages) == {*written, ROOT / "docs" / "cli.md"}
    for path, text in pages.items():
        assert text_of(path) == text, f"{path.name} is out of date: python scripts/cli_reference.py"


def test_assets_stay_light_and_are_described():
    pocket = ROOT / "bdcli" / "assets" / "pocket"
    assert sum(p.stat().st_size for p in pocket.rglob("*") if p.is_file()) < 28e6
    for role in ("target", "drafter"):
        card = (pocket / role / "README.md").read_text("utf-8")
        assert all(word in card for word in ("parameters", "data", "held out", "licence"))
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")
