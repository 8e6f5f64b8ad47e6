"""The words that CONTRIBUTING asks for: standard ones of the field, in documents, help texts, comments and messages."""

import io
import re
import tokenize

import pytest

from tests.support.documents import PAGES, ROOT, page_id, text_of

# What is not written any more, and what to write instead.
AVOIDED = {
    r"writes? on": "continue",
    r"(go|goes|going|went) on": "continue, resume",
    r"anew": "again, regenerate",
    r"(hold|holds|held|holding) against": "compare",
    r"(tell|tells|telling|told)": "report, say, distinguish",
    r"laws?": "rule, distribution",
    r"rooms?": "space, module, capacity",
    r"way in for": "adapter",
    r"the house": "the project",
}
PATTERN = re.compile(r"\b(" + "|".join(AVOIDED) + r")\b", re.I)
DATA = {"bdcli/data/synthetic.py"}  # its strings are training text
SOURCES = sorted(p for top in ("bdcli", "kernels", "scripts") for p in (ROOT / top).rglob("*.py"))
RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.yaml"))
CODE = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))


def avoided(text, first_line=1):
    """Lines of `text` with a word that is not used here."""
    flat = re.sub(r"\s", " ", text)  # a phrase may stand over a line break
    return [(first_line + text[: m.start()].count("\n"), m[0]) for m in PATTERN.finditer(flat)]


def words_of_source(path):
    """Comments, docstrings and messages; names of variables are not words of a text."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text_of(path)).readline):
        if token.type not in CODE or (page_id(path) in DATA and not token.string.startswith(('"""', "#"))):
            continue
        found += avoided(token.string, token.start[0])
    return found


def test_the_words_are_found():
    assert avoided("Go on:\nnothing is made anew.\nIt goes\non.") == [(1, "Go on"), (2, "anew"), (3, "goes on")]
    assert not avoided("lawn, bedroom, retold, hold on; a tale against")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "Makefile", ROOT / "LOG.md"], ids=page_id)
def test_documents_use_words_of_the_field(page):
    assert avoided(text_of(page)) == []


@pytest.mark.parametrize("path", RECIPES, ids=page_id)
def test_comments_of_recipes_use_words_of_the_field(path):
    assert avoided(text_of(path)) == []


@pytest.mark.parametrize("path", SOURCES, ids=page_id)
def test_sources_use_words_of_the_field(path):
    assert words_of_source(path) == []
