"""Token streams of a training mix."""

import pytest
import torch

from bdcli.config.pretrain import Corpus as Mix
from bdcli.config.pretrain import PretrainRecipe, Schedule
from bdcli.data.corpus import Corpus, make_corpus


def test_the_mix_keeps_its_shares_and_every_stream_moves_on():
    recipe = PretrainRecipe(corpus=Mix(("a", "b", "c"), (0.5, 0.3, 0.2)))
    streams = [torch.arange(k * 10_000, k * 10_000 + size, dtype=torch.int32) for k, size in enumerate((900, 400, 90))]
    corpus, cursor, seen = Corpus(recipe, streams), [0, 0, 0], []
    for context in (10, 20, 40) * 20:
        seen += corpus.take(cursor, context, 3).flatten().tolist()
    shares = [sum(k * 10_000 <= t < (k + 1) * 10_000 for t in seen) / len(seen) for k in range(3)]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.01) and sum(cursor) == len(seen)
    assert seen[:10] == list(range(10)) and set(seen) >= set(range(900 - 40))


def test_copies_are_beside_the_sources_and_can_be_foretold(tmp_path, pocket):
    recipe = PretrainRecipe(
        corpus=Mix(("stdlib", "recall"), (3.0, 1.0), copies=0.2), schedule=Schedule(tokens=40_000, contexts=(1024,))
    )
    corpus = make_corpus(recipe, pocket[2], "vocabulary", tmp_path / "tokens.pt")
    assert corpus.shares == pytest.approx([0.6, 0.2, 0.2])
    ids, known = corpus.streams[2].tolist(), 0
    assert len(ids) == 8_000 + 2 * 1024 and 0 not in ids and 1 not in ids and len(set(ids)) > 1_500
    last: dict[tuple, int] = {}
    for at in range(2, len(ids)):  # two ids tell the third, where they have stood before
        known += last.get(tuple(ids[at - 2 : at])) == ids[at]
        last[tuple(ids[at - 2 : at])] = ids[at]
    assert known > 0.45 * len(ids)
    again = make_corpus(recipe, pocket[2], "vocabulary", tmp_path / "tokens.pt")
    assert all(torch.equal(a, b) for a, b in zip(corpus.streams, again.streams))
