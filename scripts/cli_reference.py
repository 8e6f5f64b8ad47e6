"""Write the reference of the command line and of the recipes from the program itself.

    python scripts/cli_reference.py     # docs/cli.md, docs/cli/*.md and docs/recipes/*.md; a test compares them

Commands, options and their meanings come from typer's objects, settings of recipes from the schemas.
"""

from __future__ import annotations

import ast
import enum
import json
import textwrap
import types
import typing
from pathlib import Path

import typer

from bdcli.base.files import write_file
from bdcli.cli.main import app
from bdcli.config.bench import Arm, BenchRecipe
from bdcli.config.distill import DistillRecipe
from bdcli.config.loader import explain
from bdcli.config.pretrain import PretrainRecipe

DOCS = Path(__file__).parent.parent / "docs"
WIDTH = 116  # characters of a line
GROUPS = {
    "decode": ("Decode", ("decode", "prompt", "fetch", "convert")),
    "train": ("Train", ("prepare", "distill", "pretrain")),
    "measure": ("Measure", ("bench", "report", "doctor")),
}
RECIPES = {
    "distill": ("Distil recipes", "`bdcli distill` and `bdcli prepare`", {"": DistillRecipe}),
    "pretrain": ("Pretrain recipes", "`bdcli pretrain`", {"": PretrainRecipe}),
    "bench": ("Bench recipes", "`bdcli bench`", {"": BenchRecipe, "arms.NAME.": Arm}),
}
SOURCE = "Written by `scripts/cli_reference.py`; a test compares this page with the program."


def pages() -> dict[Path, str]:
    """The text of every page of the reference, by its path."""
    commands = typer.main.get_command(app).commands
    missing = set(commands) - {name for _, names in GROUPS.values() for name in names}
    if missing:
        raise SystemExit(f"GROUPS lacks the commands {', '.join(sorted(missing))}")
    found = {DOCS / "cli.md": index_page(commands)}
    for stem, (title, names) in GROUPS.items():
        sections = [command_section(name, commands[name]) for name in names]
        found[DOCS / "cli" / f"{stem}.md"] = "\n\n".join([f"# {title}: command reference", SOURCE, *sections]) + "\n"
    for stem, recipe in RECIPES.items():
        found[DOCS / "recipes" / f"{stem}.md"] = recipe_page(*recipe)
    return found


def index_page(commands: dict) -> str:
    """Every command with one line, and the options that stand before a command."""
    root = typer.main.get_command(app)
    lines = ["# Command reference", "", SOURCE, "", root.help, "", "Usage: `bdcli [OPTIONS] COMMAND [ARGUMENTS]`", ""]
    for stem, (title, names) in GROUPS.items():
        lines += [f"## {title}", ""]
        lines += [item(f"[bdcli {name}](cli/{stem}.md#bdcli-{name})", summary(commands[name])) for name in names]
        lines += [""]
    lines += ["## Options before the command", "", *option_items(root, {}), "", "## See also", ""]
    lines += [
        item(f"[{title}](recipes/{stem}.md)", f"the settings of {of}.") for stem, (title, of, _) in RECIPES.items()
    ]
    lines += [item("[Errors and exit codes](errors.md)", "what a command returns.")]
    return "\n".join(lines) + "\n"


def summary(command) -> str:
    return " ".join((command.help or "").split())


def command_section(name: str, command) -> str:
    hints = typing.get_type_hints(callback(name))
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    words = [argument_name(p) if p.required else f"[{argument_name(p)}]" for p in arguments]
    lines = [f"## bdcli {name}", "", *textwrap.wrap(summary(command), WIDTH), ""]
    lines += [f"Usage: `{' '.join(['bdcli', name, '[OPTIONS]', *words])}`", ""]
    lines += [item(f"`{argument_name(p)}`", p.help or "") for p in arguments]
    return "\n".join([*lines, *option_items(command, hints)])


def callback(name: str):
    """The function behind a command, whose annotations say what its options take."""
    known = {c.name or c.callback.__name__: c.callback for c in app.registered_commands}
    return known[name]


def argument_name(parameter) -> str:
    return (parameter.metavar or parameter.name).strip("[]").upper()


def option_items(command, hints: dict) -> list[str]:
    """One list item an option; `--help` is the same everywhere and left out."""
    items = []
    for p in command.params:
        if p.param_type_name != "option" or p.name == "help" or p.hidden:
            continue
        value = "" if p.is_flag else " " + (p.metavar or value_name(hints.get(p.name, str)))
        shown = p.default is not None and not p.is_flag
        default = f" [default: {p.default.value if isinstance(p.default, enum.Enum) else p.default}]" if shown else ""
        items.append(item(f"`{p.opts[0]}{value}`", f"{p.help or ''}{default}"))
    return items


def value_name(hint) -> str:
    """What an option takes: `NUMBER`, `PATH`, `TEXT`, or its choices."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is list:
        hint = typing.get_args(hint)[0]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "|".join(str(member.value) for member in hint)
    return {int: "NUMBER", float: "NUMBER", Path: "PATH"}.get(hint, "TEXT")


def recipe_page(title: str, commands: str, schemas: dict[str, type]) -> str:
    """Every setting of a kind of recipe: dotted key, default, meaning."""
    lines = [f"# {title}: settings", "", SOURCE, ""]
    text = (
        f"A recipe is a YAML file for {commands}. Every setting has a default; `--set key=value` changes one, "
        "`extends: other.yaml` starts from another recipe, and an unknown key is an error that names the nearest one."
    )
    lines += [*textwrap.wrap(text, WIDTH), ""]
    for prefix, schema in schemas.items():
        section = None
        for key, meaning in explain(schema, prefix):
            name, _, default = key.partition(" = ")
            if "." in name.removeprefix(prefix) or prefix:
                group = name.rpartition(".")[0]
                if group != section:
                    section = group
                    lines += ["", f"## {group}", ""]
            lines.append(item(f"`{name}`{default_text(default)}", meaning))
    return "\n".join(lines) + "\n"


def default_text(default: str) -> str:
    """` = value` as a recipe would give it; nothing where the default is nested settings."""
    if default == "required":
        return ", required"
    try:
        value = ast.literal_eval(default)
    except (ValueError, SyntaxError):  # a bare word, or nested settings
        return "" if "(" in default else f" = `{default}`"
    return f" = `{json.dumps(value)}`"


def item(head: str, text: str) -> str:
    """A list item on lines of at most WIDTH characters."""
    return textwrap.fill(
        f"- {head}: {text}", WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def main() -> None:
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        write_file(path, text)


if __name__ == "__main__":
    main()
