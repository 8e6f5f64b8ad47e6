"""Texts that the target writes together are those that it writes alone."""

import pytest
import torch

from bdcli.backends.select import pick_backend, torch_backend
from bdcli.base.progress import SILENT
from bdcli.cache.full import FullCache
from bdcli.decode.pair import Pair
from bdcli.train.distill.writer import Writer


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_is_written_together_is_what_is_written_alone(temperature, pocket, text_ids):
    target, drafter, tokenizer = pocket
    prompts = [text_ids[start : start + size] for start, size in ((0, 300), (5000, 60), (9000, 700), (800, 301))]
    seeds, written = [3, 1, 4, 1], {}
    for name, engine, together in (
        ("alone", torch_backend(), 1),
        ("together", torch_backend(), 3),
        ("compiled", pick_backend("auto", [target, drafter], SILENT), 4),
    ):
        pair = Pair(target, drafter, tokenizer, frozenset({text_ids[40]}), ("", ""), engine)
        writer = Writer(pair, together)
        assert writer.together == (1 if engine.name == "compiled" else together)
        written[name] = writer.write(prompts, 40, temperature, seeds)
    assert written["alone"] == written["together"] and all(0 < len(text) <= 40 for text in written["alone"])
    if temperature == 0:  # compiled drafts draw from a generator of their own
        assert written["compiled"] == written["alone"]


def test_a_text_that_breaks_is_left_out_and_the_others_go_on(pocket, text_ids):
    target, drafter, tokenizer = pocket
    pair = Pair(target, drafter, tokenizer, frozenset(), ("", ""), torch_backend())
    prompts = [text_ids[:80], text_ids[100:180], text_ids[200:280]]
    whole = Writer(pair, 3).write(prompts, 12, 0.0, [0, 0, 0])
    broken, feed = set(), FullCache.plan

    def spoil(cache, start, rows):
        if start == 80 - 1 and not broken:
            broken.add(id(cache))
        if id(cache) in broken:
            cache.values.fill_(torch.nan)
        return feed(cache, start, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FullCache, "plan", spoil)
        assert Writer(pair, 3).write(prompts, 12, 0.0, [0, 0, 0]) == [None, *whole[1:]]
