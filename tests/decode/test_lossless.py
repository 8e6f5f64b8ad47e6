"""Greedy text of the pocket pair equals transformers' generate(do_sample=False), token for token, in fp32."""

import functools
import itertools

import pytest
import torch

from bdcli.backends.select import pick_backend
from bdcli.base.progress import SILENT
from bdcli.cache.selection import SELECTIONS
from bdcli.config.decode import DecodeOptions
from bdcli.decode.pair import Pair
from bdcli.decode.session import Session
from bdcli.model.checkpoint import eos_tokens
from bdcli.model.hub import POCKET
from bdcli.speculation.baseline import warm_up

BUDGETS, GAMMAS, POSITIONS = (64, 256, 512, None), (1, 3, 8, None), ("rebased", "absolute")
CROSS = [
    {"budget": b, "gamma": g, "select": s, "positions": p}
    for b, g, s, p in itertools.product(BUDGETS, GAMMAS, SELECTIONS, POSITIONS)
]
SHORT = (1, 37, 333, 699)
NEW = 24


def name(case):
    return "-".join("auto/full" if v is None else str(v) for v in case.values())


@functools.cache
def hugging_face():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(POCKET / "target", dtype=torch.float32)


@functools.cache
def wanted(prompt: tuple[int, ...], new: int) -> list[int]:
    out = hugging_face().generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=new, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def check(pocket, prompt, case, new=NEW, runner="auto"):
    target, drafter, tokenizer = pocket
    options = DecodeOptions(**case, max_new_tokens=new, dtype="float32", device="cpu")
    runs = pick_backend(runner, [target, drafter], SILENT)
    pair = Pair(target, drafter, tokenizer, eos_tokens(POCKET / "target"), ("pocket", "pocket"), runs)
    session = Session(pair, options)
    engine = session.speculator(len(prompt))
    engine.prefill(list(prompt))
    controller = warm_up(engine, options.gamma, session.selection.gamma_max)
    steps = list(engine.rounds(new, pair.eos, controller))
    assert engine.new_tokens == wanted(tuple(prompt), new)
    assert sum(step.drafted for step in steps) > 0
    if case["budget"] is not None and case["select"] != "official":
        assert engine.drafter.peak_entries <= case["budget"]


@pytest.mark.parametrize("case", CROSS, ids=name)
def test_whole_cross_on_short_prompts(case, pocket, text_ids):
    for length in SHORT:
        check(pocket, text_ids[5000 : 5000 + length], case)


@pytest.mark.parametrize("case", CROSS[1::7], ids=name)
def test_the_torch_engine_on_part_of_it(case, pocket, text_ids):
    for length in SHORT[1:]:
        check(pocket, text_ids[5000 : 5000 + length], case, runner="torch")


@pytest.mark.parametrize("case", CROSS[::13], ids=name)
def test_sample_at_4k(case, pocket, text_ids):
    check(pocket, text_ids[:4096], case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CROSS, ids=name)
def test_whole_cross_at_4k(case, pocket, text_ids):
    check(pocket, text_ids[9000 : 9000 + 4096], case, new=64)


@pytest.mark.slow
@pytest.mark.parametrize("context", [8192, 16384])
@pytest.mark.parametrize("case", CROSS[::13], ids=name)
def test_sample_at_8k_and_16k(case, context, pocket, text_ids):
    check(pocket, text_ids[:context], case, new=64)


@pytest.mark.slow
@pytest.mark.parametrize("select", ["window", "chunk"])
def test_two_thousand_new_tokens_stay_within_the_budget(select, pocket, text_ids):
    check(pocket, text_ids[:1500], {"budget": 256, "gamma": None, "select": select, "positions": "rebased"}, new=2000)
