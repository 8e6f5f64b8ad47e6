"""The target as its own drafter: in fewer bits, with the target's keys, and with the target's text."""

from __future__ import annotations

import pytest
import torch

from bdcli.backends.select import pick_backend, torch_backend
from bdcli.base.errors import UserError
from bdcli.base.progress import SILENT
from bdcli.cache.selection import Chunk, Full, Window
from bdcli.config.decode import DecodeOptions
from bdcli.decode.pair import load_pair, with_drafter
from bdcli.decode.session import Session
from bdcli.speculation.drafter import ModelDrafter
from bdcli.speculation.sampling import Sampling
from bdcli.speculation.speculator import Speculator
from tests.support.backends import drafter as make_drafter
from tests.support.compiled import FRESH, SHAPES
from tests.support.models import tiny_model

ENGINES = ["torch", "compiled"]


def backend_of(name, models):
    return torch_backend() if name == "torch" else pick_backend(name, models, SILENT)


def entries_of(cache, positions):
    """Keys [layers, Hkv, n, D] that a budgeted cache holds of positions."""
    places = cache._places(torch.tensor(positions), cache.ring_at)
    if hasattr(cache, "panel_keys"):
        return cache.panel_keys[:, :, places // 16, :, places % 16].flatten(-2).permute(1, 2, 0, 3)
    return cache.keys[:, :, :, places].transpose(2, 3)


@pytest.mark.parametrize("positions", ["rebased", "absolute"])
@pytest.mark.parametrize("prompt", [1, 3, 40, 333])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_cache_holds_the_targets_own_keys(engine, prompt, positions):
    """After the prompt and after every round, whatever was rejected."""
    model = tiny_model(**SHAPES[0], seed=4)
    backend, selection = backend_of(engine, [model]), Window(64, positions)
    size = (prompt + 60,)
    target = make_drafter(backend, model, Full(), *size).runner
    own = ModelDrafter(backend.runner_type(model, selection.cache(backend.caches, model, sizes(prompt))), own=True)
    run = Speculator(target, own, Sampling(0.7), seed=1)
    run.prefill(torch.randint(41, (prompt,), generator=FRESH).tolist())
    view = own.runner.cache.view
    for gamma in (3, 1, 5, 2, 16, 4):
        run.round(gamma)
        held = len(run.ids) - 1
        seen = [p for p in range(held) if p < view.sinks or p > held - view.window]
        assert own.length == target.length == held
        assert torch.equal(entries_of(own.runner.cache, seen), target.cache.entries(torch.tensor(seen))[0])
    assert own.peak_entries <= 64


def sizes(prompt):
    from bdcli.cache.selection import CacheSize

    return CacheSize(prompt, prompt + 120, prompt + 120)


@pytest.mark.parametrize("case", [Window(64), Window(64, "absolute"), Chunk(64), Full()], ids=lambda s: s.label)
@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_text_is_the_targets(engine, case, text_ids):
    kept = {"budget": case.budget, "select": "chunk" if case.chooses else "window", "positions": case.positions}
    options = DecodeOptions(drafter="self", dtype="float32", engine=engine, max_new_tokens=40, gamma=4, **kept)
    session = Session.open(options)
    plain = Session.open(DecodeOptions(dtype="float32", engine="torch", max_new_tokens=40, baseline="off", gamma=1))
    prompt = text_ids[:400]
    got = session.decode(prompt)
    assert got.tokens == plain.decode(prompt).tokens
    assert got.settings["drafter"] == "self"
    assert got.figures.acceptance_rate > (0.9 if case.budget is None else 0.1)


def test_the_drafter_shares_what_it_does_not_multiply():
    pair = load_pair(DecodeOptions(drafter="self"))
    assert pair.drafter.embedding is pair.target.embedding and pair.drafter.norm is pair.target.norm
    assert pair.drafter.weights == "int4"
    assert pair.weight_bytes < pair.target.weight_bytes + pair.drafter.weight_bytes
    light = load_pair(DecodeOptions(drafter="self", weights="int4"))
    assert light.drafter is light.target and light.target.weights == "int4"
    assert light.weight_bytes < 0.4 * pair.target.weight_bytes
    assert with_drafter(pair, "self", "int8").drafter.weights == "int8"
    assert load_pair(DecodeOptions(drafter="self", draft_weights="bf16")).drafter.weights != "int4"


def test_self_is_the_drafter_of_a_target_that_is_named():
    assert DecodeOptions().drafter == "pocket"
    assert DecodeOptions(target="some/folder").drafter == "self"
    assert DecodeOptions(target="some/folder", drafter="pocket").drafter == "pocket"


def test_weights_of_few_bits_need_the_compiled_engine():
    with pytest.raises(UserError, match="--weights int4 needs the compiled engine"):
        load_pair(DecodeOptions(weights="int4", engine="torch"))
    with pytest.raises(UserError, match="--draft-weights int3 is not one of"):
        DecodeOptions(draft_weights="int3")
