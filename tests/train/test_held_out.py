"""Held-out loss, and what a long context is worth."""

import pytest
import torch
import torch.nn.functional as F

from bdcli.cache.full import FullCache
from bdcli.train.held_out import SHORT_ROWS, measure, window_losses
from tests.support.models import tiny_model


@pytest.mark.parametrize("rows", [SHORT_ROWS, 4])
def test_the_worth_of_a_long_context_is_that_of_a_cut_one(rows):
    """The short losses must equal those of texts cut to their last tokens, each cut text read alone."""
    model, window = tiny_model(vocab=300), torch.randint(0, 300, (512,))
    whole, tail, short = window_losses(model, window, torch.float32, rows)
    alone = []
    for start in range(512 - 256, 512, rows):  # tail of 256 tokens, predicted `rows` at a time
        cut = window[start - 256 : start + rows].tolist()
        logits = model.forward(cut, FullCache(model, len(cut)), rows + 1)[:-1]
        alone.append(F.cross_entropy(logits, torch.tensor(cut[-rows:]), reduction="none"))
    torch.testing.assert_close(short, torch.cat(alone), rtol=1e-4, atol=1e-4)
    logits = model.forward(window.tolist(), FullCache(model, 512), 512)[:-1]
    torch.testing.assert_close(whole, F.cross_entropy(logits, window[1:], reduction="none"), rtol=1e-4, atol=1e-4)
    assert torch.equal(tail, whole[-256:])
    if rows == SHORT_ROWS:
        got = measure(model, window[None], 512, torch.float32)
        assert (got.nll, got.tail_nll) == (float(whole.mean()), float(tail.mean()))
        assert got.tail_nll_short == pytest.approx(float(torch.cat(alone).mean()), rel=1e-4)
        assert got.tail_nll != pytest.approx(got.tail_nll_short, rel=1e-4)
