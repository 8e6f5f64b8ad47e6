"""Synthetic texts repeat what only memory can foretell."""

import itertools

from bdcli.data.synthetic import recall_documents


def test_recall_texts_repeat_near_and_far():
    (name, text), again = next(recall_documents(1)), next(recall_documents(1))
    assert (name, text) == again and len(text) >= 48_000
    sources = {line: [] for line in text.splitlines() if len(line) > 20}
    for at, line in enumerate(text.splitlines()):
        if line in sources:
            sources[line].append(at)
    gaps = [b - a for places in sources.values() for a, b in itertools.pairwise(places)]
    assert min(gaps) <= 2 and max(gaps) > 100 and len(gaps) > 0.3 * len(text.splitlines()) / 2
