"""Sizes at their edges: prompts around the budget, tiny prompts, and settings far beyond what a run can use."""

import pytest
import torch

from bdcli.backends.select import pick_backend
from bdcli.base.errors import UserError
from bdcli.base.progress import SILENT
from bdcli.config.decode import DecodeOptions
from bdcli.decode.pair import Pair
from bdcli.decode.session import Session
from tests.support.cli import compiled_only
from tests.support.compiled import SHAPES
from tests.support.models import tiny_model

ENGINES = ["torch", pytest.param("compiled", marks=compiled_only)]
SELECTS = ["window", "chunk", "official"]
TEXT = torch.randint(41, (300,), generator=torch.Generator().manual_seed(3)).tolist()


def session(pocket, engine, **options):
    target = tiny_model(**SHAPES[0], seed=1)
    drafter = tiny_model(**SHAPES[0], seed=1)
    drafter.head = drafter.head + 0.02 * torch.randn_like(drafter.head)
    backend = pick_backend(engine, [target, drafter], SILENT)
    pair = Pair(target, drafter, pocket[2], frozenset(), ("t", "d"), backend)
    return Session(pair, DecodeOptions(**{"check": True, "max_new_tokens": 12, "dtype": "float32"} | options))


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_prompts_around_the_budget_are_decoded(engine, select, pocket):
    for n, over in enumerate((-32, -31, -18, -17, -16, -15, -8, -1, 0, 1, 2, 9)):
        run = session(pocket, engine, budget=96, select=select, gamma=(4, 30)[n % 2])
        done = run.decode(TEXT[: 96 + over])
        assert done.figures.output_equal is True, over
        assert done.figures.drafted > 0
        if select != "official":
            assert done.figures.max_drafter_entries <= 96


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_prompts_of_one_to_three_tokens_are_decoded(engine, select, pocket):
    for length in (1, 2, 3):
        for options in ({"budget": 64}, {"budget": None}, {"budget": 10**6, "gamma": 9, "max_new_tokens": 2}):
            done = session(pocket, engine, select=select, **options).decode(TEXT[:length])
            assert done.figures.output_equal is True


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_settings_beyond_what_the_run_can_use_take_no_memory(engine, select, pocket):
    """A cache has entries for prompt, new tokens and a draft tail, and a draft is no longer than the text to come."""
    small = session(pocket, engine, select=select, budget=512, gamma=11).decode(TEXT[:200])
    large = session(pocket, engine, select=select, budget=10**9, gamma=10**8, top_k=2**31 - 1).decode(TEXT[:200])
    assert large.tokens == small.tokens and large.figures.output_equal is True
    assert large.figures.drafter_kv_bytes <= small.figures.drafter_kv_bytes
    assert large.settings["gamma"] == 11 and large.settings["top_k"] == 41
    assert max(r[1] for r in large.rounds) <= 11


@pytest.mark.parametrize("engine", ENGINES)
def test_prompt_and_new_tokens_may_fill_the_model(engine, pocket):
    run = session(pocket, engine, gamma=60, budget=128, max_new_tokens=100)
    limit = run.pair.target.config.max_position
    ids = (TEXT * 20)[: limit - 100]
    done = run.decode(ids)
    assert done.figures.output_equal is True and len(done.tokens) == 100


@pytest.mark.parametrize("name", ["top_k", "seed", "max_new_tokens"])
def test_numbers_that_no_run_can_use_are_refused(name):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} "):
        DecodeOptions(**{name: 10**23})
