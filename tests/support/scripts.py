"""The scripts, loaded as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from typer.testing import CliRunner

SCRIPTS = Path(__file__).parents[2] / "scripts"


def load(name: str) -> ModuleType:
    """The script as a module; its processes find it by this name too."""
    if str(SCRIPTS) not in sys.path:  # scripts import their neighbours
        sys.path.append(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(script: ModuleType, *words: object) -> str:
    """What a command of the script prints on stdout."""
    done = CliRunner().invoke(script.app, [str(w) for w in words], catch_exceptions=False, standalone_mode=False)
    return done.stdout
