"""One forward of several texts has the logits of each alone."""

import random

import pytest

from bdcli.cache.budget import BudgetCache
from bdcli.cache.full import FullCache
from bdcli.cache.official import OfficialCache
from bdcli.cache.view import plan_view
from tests.support.models import tiny_model


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_texts_forwarded_together_have_the_logits_of_each_alone(kv_heads):
    model, rng = tiny_model(kv_heads=kv_heads), random.Random(kv_heads)
    view = plan_view(40, "window", "rebased", 4, 100)
    makers = [
        lambda: FullCache(model, 200),
        lambda: BudgetCache(model, 200, view),
        lambda: OfficialCache(model, 200, 16),
        lambda: FullCache(model, 200),
    ]
    prompts = [rng.choices(range(41), k=size) for size in (90, 61, 33, 7)]
    texts = [rng.choices(range(41), k=size) for size in (3, 23, 1, 12)]  # longer than a budgeted cache takes at once
    rows = [1, 4, 1, 12]
    alone, together = [], [make() for make in makers]
    for make, cache, prompt, text, wanted in zip(makers, together, prompts, texts, rows):
        mine = make()
        model.prefill(prompt, mine)
        model.prefill(prompt, cache)
        alone.append(model.forward(text, mine, wanted))
    found = model.forward_together(texts, together, rows)
    for a, b, cache, prompt, text in zip(alone, found, together, prompts, texts):
        assert a.shape == b.shape and (a - b).abs().max() < 1e-4 * a.abs().max()
        assert cache.length == len(prompt) + len(text)
