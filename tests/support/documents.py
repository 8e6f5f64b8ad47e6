"""The documents of the repository and what is named in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(p for p in ROOT.glob("docs/**/*.md") if "log" not in p.parts)]
)
FENCED = re.compile(r"^```.*?\n(.*?)^```$", re.M | re.S)


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(path: Path) -> str:
    return path.read_text("utf-8")


def prose(path: Path) -> str:
    """The page without its fenced blocks."""
    return FENCED.sub("", text_of(path))


def spans(path: Path) -> list[str]:
    """Inline code of a page; a line break inside a span is a space."""
    return [" ".join(s.split()) for s in re.findall(r"`([^`]+)`", prose(path))]


def code(path: Path) -> list[str]:
    """All code of a page: inline spans, and the lines of fenced blocks."""
    return [*spans(path), *(line for block in FENCED.findall(text_of(path)) for line in block.splitlines())]
