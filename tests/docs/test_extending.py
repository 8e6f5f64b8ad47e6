"""The code in docs/extending.md runs, and what it adds leaves the output as it is."""

import re

import pytest
import torch

from bdcli.backends.select import torch_backend
from bdcli.cache.selection import CacheSize, Window
from bdcli.speculation.draft_length import FixedGamma
from bdcli.speculation.sampling import Sampling
from bdcli.speculation.speculator import Speculator
from tests.support.documents import ROOT, text_of

PROMPT, NEW, GAMMA = 300, 24, 4
SIZE = CacheSize(PROMPT - 1, PROMPT + NEW + GAMMA + 2, PROMPT + NEW)


@pytest.fixture(scope="module")
def shown():
    """The names that the page's code defines."""
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```$", text_of(ROOT / "docs" / "extending.md"), re.M | re.S):
        exec(block, names)
    return names


def write(pocket, ids, drafter, backend=None):
    """New tokens after a prompt, and the speculator that wrote them."""
    target = (backend or torch_backend()).target(pocket[0], SIZE)
    engine = Speculator(target, drafter, Sampling(), 0)
    engine.prefill(ids[:PROMPT])
    for _ in engine.rounds(NEW, frozenset(), FixedGamma(GAMMA)):
        pass
    return engine.new_tokens, engine


@pytest.fixture(scope="module")
def plain(pocket, text_ids):
    return write(pocket, text_ids, None)[0]


def test_the_drafter_shown_leaves_the_text_as_it_is(shown, pocket, text_ids, plain):
    assert write(pocket, text_ids, shown["Repeat"]())[0] == plain


def test_the_selection_shown_keeps_its_budget(shown, pocket, text_ids, plain):
    selection = shown["Recent"](64, gamma=GAMMA)
    assert isinstance(selection, Window)
    assert selection.view(PROMPT).sinks == 0
    drafter = torch_backend().drafter(pocket[1], selection, SIZE, pocket[0].config.vocab_size)
    assert write(pocket, text_ids, drafter)[0] == plain
    assert drafter.peak_entries == 64


def test_the_loss_shown_is_one_minus_acceptance(shown):
    p, q = torch.rand(2, 3, 7).softmax(-1)
    assert torch.allclose(shown["total_variation"](p, q), (p - q).abs().sum(-1) / 2)


def test_the_backend_shown_decodes(shown, pocket, text_ids, plain):
    text, engine = write(pocket, text_ids, None, shown["counting_backend"]())
    assert text == plain
    assert engine.target.forwards == NEW
