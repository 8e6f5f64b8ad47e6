"""Recipes as trees: YAML files and `--set` options parsed, each value with the place where it stands.

A parsed mapping is {key: (value, "file:line")}; nested mappings are values of the same form.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from pathlib import Path

import yaml

from bdcli.base.errors import UserError

_MOST_ENTRIES = 10_000  # of a recipe: aliases can make a short file endless
_LONGEST_SHOWN = 120  # characters of an option in messages
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 80
_SHOWN.maxlevel, _SHOWN.maxlist, _SHOWN.maxdict = 3, 12, 6


class Faults:
    """Collects errors; `raise_if_any` turns them into one UserError."""

    def __init__(self, name: str):
        self._name, self._lines = name, []
        self.keys: list[str] = []  # settings whose own value is wrong

    def add(self, where: str, message: str, key: str = "") -> None:
        self._lines.append(f"{where}: {message}")
        self.keys.append(key)

    def raise_if_any(self) -> None:
        if self._lines:
            count = f"{len(self._lines)} error{'s' if len(self._lines) > 1 else ''}"
            raise UserError(f"{count} in {self._name}\n  " + "\n  ".join(self._lines))


class WrittenInt(int):
    """A whole number, and how it is written: 010 may be a name."""

    text: str


class WrittenFloat(float):
    """A number, and how it is written."""

    text: str


class _Loader(yaml.SafeLoader):
    """YAML's plain types without dates; what cannot be made of a value is left as text."""


def _as_written(kind: type, construct: Callable) -> Callable:
    def make(loader: yaml.SafeLoader, node: yaml.Node) -> object:
        try:
            number = kind(construct(loader, node))
        except (ValueError, OverflowError, IndexError):  # thousands of digits, or !!int of a word
            return str(node.value)
        number.text = node.value
        return number

    return make


LONGEST_NAME = 300  # characters of a path that an error shows
_TAG = "tag:yaml.org,2002:"
_Loader.add_constructor(f"{_TAG}int", _as_written(WrittenInt, yaml.SafeLoader.construct_yaml_int))
_Loader.add_constructor(f"{_TAG}float", _as_written(WrittenFloat, yaml.SafeLoader.construct_yaml_float))
_Loader.add_constructor(f"{_TAG}timestamp", yaml.SafeLoader.construct_yaml_str)


def read_tree(path: Path, faults: Faults, seen: tuple[Path, ...] = ()) -> dict:
    """The tree of a file over those that it extends. Raises UserError where one is no YAML mapping."""
    name = str(path) if len(str(path)) <= LONGEST_NAME else f"{str(path)[:LONGEST_NAME]}..."
    try:
        resolved, text = path.resolve(), path.read_text("utf-8")
    except FileNotFoundError:
        raise UserError(f"recipe {name} does not exist", "See the recipes/ folder") from None
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"recipe {name} cannot be read ({why})", "Give a YAML file") from None
    if resolved in seen:
        raise UserError(f"{path} extends itself", "Break the circle of extends")
    try:
        node = yaml.compose(text, _Loader)
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"recipe {path} is not a mapping", "Write `key: value` lines")
        tree = _Mapping(path, faults).tree(node)
    except yaml.YAMLError as error:
        raise _not_yaml(path, text, error) from None
    except RecursionError:
        raise UserError(f"recipe {path} is nested too deeply", "Write `key: value` lines") from None
    base, place = tree.pop("extends", (None, ""))
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{place}: extends must be the name of a recipe, not {shown(base)}", "Give one file")
    return _merge(read_tree(path.parent / base, faults, (*seen, resolved)), tree)


def _not_yaml(path: Path, text: str, error: yaml.YAMLError) -> UserError:
    """What YAML found wrong, with its line where it gives one, in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    line = mark.line + 1 if mark else None
    if isinstance(error, yaml.reader.ReaderError):
        line, problem = text.count("\n", 0, error.position) + 1, error.reason
    place = f"{path}:{line}" if line else str(path)
    why = " ".join(str(problem or error).split())
    return UserError(f"{place}: not valid YAML ({why})", "Mind the indentation")


class _Mapping:
    """Builds the tree of a file."""

    def __init__(self, path: Path, faults: Faults):
        self._path, self._faults = path, faults
        self._loader, self._entries = _Loader(""), 0

    def tree(self, node: yaml.MappingNode) -> dict:
        tree: dict = {}
        for key_node, value_node in node.value:
            place = f"{self._path}:{key_node.start_mark.line + 1}"
            self._entries += 1
            if self._entries > _MOST_ENTRIES:
                raise UserError(f"{place}: more than {_MOST_ENTRIES} entries", "Leave out aliases of aliases")
            if not isinstance(key_node, yaml.ScalarNode):
                self._faults.add(place, "a key must be text")
                continue
            if key_node.value in tree:
                self._faults.add(place, f"{key_node.value} is given twice")
            if isinstance(value_node, yaml.MappingNode):
                tree[key_node.value] = (self.tree(value_node), place)
            else:
                tree[key_node.value] = (self._value(value_node), place)
        return tree

    def _value(self, node: yaml.Node) -> object:
        try:
            return self._loader.construct_object(node, deep=True)
        except (KeyError, ValueError, TypeError, AttributeError):  # a tag on what is none of its kind
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.tag.replace(_TAG, '!!')} does not fit its value", node.start_mark
            ) from None


def _merge(base: dict, over: dict) -> dict:
    merged = dict(base)
    for key, (value, place) in over.items():
        old = merged.get(key, (None, ""))[0]
        merged[key] = (_merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value, place)
    return merged


def apply_override(tree: dict, override: str, faults: Faults) -> None:
    """Put `a.b=value` into a tree; what is no YAML is text."""
    key, equals, text = override.partition("=")
    place = f"--set {override if len(override) <= _LONGEST_SHOWN else override[:_LONGEST_SHOWN] + '...'}"
    if not equals or not key:
        faults.add(place, "must look like key=value")
        return
    *parents, last = key.split(".")
    for parent in parents:
        child, at = tree.get(parent, (None, place))
        tree[parent] = (dict(child), at) if isinstance(child, dict) else ({}, place)
        tree = tree[parent][0]
    tree[last] = (_placed(_parse(text), place), place)


def _parse(text: str) -> object:
    try:
        return yaml.load(text, _Loader) if text else ""
    except (yaml.YAMLError, KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return text


def _placed(value: object, place: str) -> object:
    """A parsed value as a tree: mappings carry the place of every entry."""
    if not isinstance(value, dict):
        return value
    return {str(key): (_placed(inner, place), place) for key, inner in value.items()}


def leaves(tree: dict, prefix: str = "") -> dict[str, tuple[object, str]]:
    """(value, place) of every dotted key, those of mappings among them."""
    found = {}
    for key, (value, place) in tree.items():
        found[prefix + key] = (value, place)
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{key}.")
    return found


def shown(value: object) -> str:
    """A value of a tree as a message shows it: in bounded length, without places."""
    return _SHOWN.repr(_plain(value))


def _plain(value: object) -> object:
    if not isinstance(value, dict):
        return value
    return {key: _plain(inner[0]) if isinstance(inner, tuple) else inner for key, inner in value.items()}
