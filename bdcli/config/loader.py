"""Recipes: trees of settings with a strict schema. Every error is reported at once, with its line and nearest name.

A recipe may say `extends: other.yaml` (relative to itself) and any key may be overridden by `--set a.b=value`; the
schema is a tree of dataclasses (`bdcli.config.distill` and others) whose fields carry type, default and meaning.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path

from bdcli.config.settings import INT_LIMIT, bounds_problems
from bdcli.config.tree import Faults, apply_override, leaves, read_tree, shown


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
    tree = read_tree(path, faults) if path is not None else {}
    for override in overrides:
        apply_override(tree, override, faults)
    where = {key: place for key, (_, place) in leaves(tree).items()}
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
                faults.add(at, f"{prefix}{key} must be a mapping, not {shown(value)}", f"{prefix}{key}")
        else:
            converted = _convert(value, hints[key])
            if isinstance(converted, _Wrong):
                faults.add(at, f"{prefix}{key} must be {converted.wanted}, not {shown(value)}", f"{prefix}{key}")
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
                faults.add(at, f"{prefix}{name} must be {entry.wanted}, not {shown(value)}", f"{prefix}{name}")
        elif isinstance(value, dict):
            entry = _build(inner, value, f"{prefix}{name}.", faults, at)
        else:
            entry = None
            faults.add(at, f"{prefix}{name} must be a mapping, not {shown(value)}", f"{prefix}{name}")
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
        return next((arg for arg in args if arg == value), _Wrong(_one_of(value, args)))
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        done = [_convert(item, args[0]) for item in items]
        wrong = next((d for d in done if isinstance(d, _Wrong)), None)
        return _Wrong(f"a list of {wrong.wanted}") if wrong else tuple(done)
    if isinstance(value, bool):
        return value if hint is bool else _Wrong(_WANTED[hint])
    if hint is float and isinstance(value, (int, float, str)):
        return _finite(value)
    if hint is int and isinstance(value, int):
        return int(value) if abs(value) < INT_LIMIT else _Wrong("a whole number below 2^63")
    if hint is str and isinstance(value, (str, int, float)):
        return str(getattr(value, "text", value))  # a name may look like a number: 1.10
    return _Wrong(_WANTED[hint])


_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _finite(value: float | str) -> float | _Wrong:
    """A number; YAML 1.1 reads 1e-4 as a string."""
    try:
        number = float(value)
    except ValueError:
        return _Wrong(_WANTED[float])
    except OverflowError:  # of a whole number
        number = math.inf
    return number if math.isfinite(number) else _Wrong("a finite number")


def _one_of(value: object, choices: tuple) -> str:
    near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1)
    return f"one of {', '.join(map(str, choices))}" + (f" (did you mean {near[0]}?)" if near else "")
