"""A short corpus: most of the time of a small sweep would go into encoding all of the standard library."""

import pytest

from bdcli.data.prompts import stdlib_text


@pytest.fixture(autouse=True)
def _short_corpus(monkeypatch):
    monkeypatch.setattr("bdcli.data.sources.stdlib_text", lambda: stdlib_text()[:60_000])
