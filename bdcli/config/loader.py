"""Recipes: YAML files with a strict schema. Every error of a file is reported at once, with its line and nearest name.

A recipe may say `extends: other.yaml` (relative to itself) and any key may be overridden by `--set a.b=value`; the
schema is a tree of dataclasses (`bdcli.config.distill` and others) whose fields carry type, default and meaning.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path

import yaml

from bdcli.base.errors import UserError
from bdcli.config.settings import bounds_problems


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


def load_recipe(path: Path | None, schema: type, overrides: list[str] = (), check: Callable | None = None):
    """An instance of the dataclass `schema` from the YAML file `path`, or from defaults and `overrides` alone.

    Raises UserError with every fault found.

    Values have types and bounds of their own. `schema` may define `problems(self) -> Iterator[tuple[str, str]]` that
    yields (dotted key, message) for values that do not fit together; `check(recipe)` does the same for what must exist
    on the machine.
    Where some value has a wrong type, they speak of the settings that the file gives and that are right by themselves.
    """
    name = str(path) if path is not None else "the options"
    faults = Faults(name)
    tree = _read(path, faults, seen=()) if path is not None else {}
    for override in overrides:
        _apply_override(tree, override, faults)
    where = {key: place for key, (_, place) in _leaves(tree).items()}
    recipe = _build(schema, tree, "", faults, name)
    if recipe is None:
        faults.raise_if_any()
    wrong = set(faults.keys)  # empty where nothing is wrong yet; unknown keys put in an empty name
    found = [*bounds_problems(recipe), *getattr(recipe, "problems", list)(), *(check(recipe) if check else ())]
    for key, message in found:
        if wrong and (key not in where or key in wrong):
            continue  # it may only be the default that stands in for a wrong value
        inside = max((k for k in where if k == key or key.startswith(k + ".")), key=len, default=None)
        place = name if inside is None else where[inside]
        faults.add(place, f"{key}: {message}")
    faults.raise_if_any()
    return recipe


def as_dict(recipe) -> dict:
    """The resolved configuration, for the store and for hashing."""
    return asdict(recipe)


def explain(schema: type, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key = default, meaning) of every setting, for help texts."""
    rows = []
    hints = typing.get_type_hints(schema)
    for f in fields(schema):
        if is_dataclass(hints[f.name]):
            rows += explain(hints[f.name], f"{prefix}{f.name}.")
        else:
            default = "required" if _required(f) else f.default if f.default is not MISSING else f.default_factory()
            rows.append((f"{prefix}{f.name} = {default}", f.metadata.get("help", "")))
    return rows


# A parsed mapping is {key: (value, "file:line")}, nested mappings are values of the same form.


def _read(path: Path, faults: Faults, seen: tuple[Path, ...]) -> dict:
    if path.resolve() in seen:
        raise UserError(f"{path} extends itself", "Break the circle of extends")
    try:
        node = yaml.compose(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist", "See the recipes/ folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read ({error})", "Give a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(
            f"{place}: not valid YAML ({getattr(error, 'problem', error)})", "Mind the indentation"
        ) from None
    if node is None or not isinstance(node, yaml.MappingNode):
        raise UserError(f"recipe {path} is not a mapping", "Write `key: value` lines")
    tree = _mapping(node, path, faults)
    base = tree.pop("extends", None)
    if base is None:
        return tree
    return _merge(_read(path.parent / str(base[0]), faults, (*seen, path.resolve())), tree)


def _mapping(node: yaml.MappingNode, path: Path, faults: Faults) -> dict:
    loader = yaml.SafeLoader("")
    tree: dict = {}
    for key_node, value_node in node.value:
        place = f"{path}:{key_node.start_mark.line + 1}"
        key = str(key_node.value)
        if key in tree:
            faults.add(place, f"{key} is given twice")
        if isinstance(value_node, yaml.MappingNode):
            tree[key] = (_mapping(value_node, path, faults), place)
        else:
            tree[key] = (loader.construct_object(value_node, deep=True), place)
    return tree


def _merge(base: dict, over: dict) -> dict:
    merged = dict(base)
    for key, (value, place) in over.items():
        old = merged.get(key, (None, ""))[0]
        merged[key] = (_merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value, place)
    return merged


def _apply_override(tree: dict, override: str, faults: Faults) -> None:
    key, equals, text = override.partition("=")
    place = f"--set {override}"
    if not equals or not key:
        faults.add(place, "must look like key=value")
        return
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        value = text
    *parents, last = key.split(".")
    for parent in parents:
        child = tree.get(parent, ({}, place))[0]
        tree[parent] = (dict(child) if isinstance(child, dict) else {}, tree.get(parent, (None, place))[1])
        tree = tree[parent][0]
    tree[last] = (_placed(value, place), place)


def _placed(value: object, place: str) -> object:
    """A parsed value in the form of `_read`: mappings carry the place of every entry."""
    if not isinstance(value, dict):
        return value
    return {str(key): (_placed(inner, place), place) for key, inner in value.items()}


def _leaves(tree: dict, prefix: str = "") -> dict[str, tuple[object, str]]:
    found = {}
    for key, (value, place) in tree.items():
        found[prefix + key] = (value, place)
        if isinstance(value, dict):
            found |= _leaves(value, f"{prefix}{key}.")
    return found


def _required(f) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _build(schema: type, tree: dict, prefix: str, faults: Faults, place: str):
    hints = typing.get_type_hints(schema)
    known = {f.name: f for f in fields(schema)}
    values = {}
    for key, (value, at) in tree.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
            faults.add(at, f"unknown key {prefix}{key}; {hint}")
        elif is_dataclass(hints[key]) or typing.get_origin(hints[key]) is dict:
            if isinstance(value, dict):
                build = _build if is_dataclass(hints[key]) else _build_named
                built = build(hints[key], value, f"{prefix}{key}.", faults, at)
                values |= {} if built is None else {key: built}
            else:
                faults.add(at, f"{prefix}{key} must be a mapping, not {value!r}", f"{prefix}{key}")
        else:
            converted = _convert(value, hints[key])
            if isinstance(converted, _Wrong):
                faults.add(at, f"{prefix}{key} must be {converted.wanted}, not {value!r}", f"{prefix}{key}")
            else:
                values[key] = converted
    for name, f in known.items():
        if name not in tree and _required(f):
            faults.add(place, f"{prefix}{name} is missing")
            return None
    try:
        return schema(**values)
    except TypeError:  # a required value was wrong and is already reported
        return None


def _build_named(hint: object, tree: dict, prefix: str, faults: Faults, _place: str) -> dict:
    """dict[str, X]: any names, each with a value of type X, itself a schema or a plain type."""
    inner, built = typing.get_args(hint)[1], {}
    for name, (value, at) in tree.items():
        if not is_dataclass(inner):
            entry = _convert(value, inner)
            if isinstance(entry, _Wrong):
                faults.add(at, f"{prefix}{name} must be {entry.wanted}, not {value!r}", f"{prefix}{name}")
        elif isinstance(value, dict):
            entry = _build(inner, value, f"{prefix}{name}.", faults, at)
        else:
            entry = None
            faults.add(at, f"{prefix}{name} must be a mapping, not {value!r}", f"{prefix}{name}")
        if entry is not None and not isinstance(entry, _Wrong):
            built[name] = entry
    return built


class _Wrong(typing.NamedTuple):
    wanted: str


def _convert(value: object, hint: object) -> object:
    """`value` as type `hint`, or _Wrong. Handles int, float, str, bool, Literal, X | None and tuple[X, ...]."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        tried = [_convert(value, arg) for arg in args if arg is not type(None)]
        if value is None and type(None) in args:
            return None
        good = [t for t in tried if not isinstance(t, _Wrong)]
        return good[0] if good else _Wrong(" or ".join(t.wanted for t in tried))
    if origin is typing.Literal:
        return value if value in args else _Wrong(_one_of(value, args))
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        done = [_convert(item, args[0]) for item in items]
        wrong = next((d for d in done if isinstance(d, _Wrong)), None)
        return _Wrong(f"a list of {wrong.wanted}") if wrong else tuple(done)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as a string
        except ValueError:
            return _Wrong("a number")
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    return _Wrong({int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint])


def _one_of(value: object, choices: tuple) -> str:
    near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1)
    return f"one of {', '.join(map(str, choices))}" + (f" (did you mean {near[0]}?)" if near else "")
