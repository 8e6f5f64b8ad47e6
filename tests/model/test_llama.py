"""Logits of the lean decoder against `transformers`, for every architecture and RoPE type it accepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from bdcli.cache.full import FullCache
from bdcli.model import llama as llama_module
from bdcli.model.checkpoint import load_model
from bdcli.model.config import RopeConfig, parse_config
from tests.support.models import library_model

CPU = torch.device("cpu")
TAIL = 9  # tokens after the prefill
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LLAMA3 = {  # at 64 original positions and 8 pairs all three bands occur
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {  # a ramp over pairs 2 to 6 of 8; the default betas would make it another
    "rope_type": "yarn",
    "rope_theta": 200.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 128,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 200.0,
    "factor": 4.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 0.7 * i for i in range(8)],
    "original_max_position_embeddings": 128,
}
CASES = {
    "llama-mha-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-gqa-linear": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LINEAR}),
    "llama-biases-llama3": (
        "Llama",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    ),
    "llama-longrope-short": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LONGROPE}),
    "qwen2-longrope-long": (
        "Qwen2",
        {"num_key_value_heads": 2, "rope_parameters": LONGROPE | {"original_max_position_embeddings": 64}},
    ),
    "llama-dynamic-within": ("Llama", {"num_key_value_heads": 2, "rope_parameters": DYNAMIC}),
    "mistral-head-dim": ("Mistral", {"num_key_value_heads": 2, "head_dim": 22, "sliding_window": None}),
    "mistral-yarn": ("Mistral", {"num_key_value_heads": 4, "sliding_window": None, "rope_parameters": YARN}),
    "qwen2-tied": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2", {"num_key_value_heads": 2, "rope_parameters": YARN}),
    "qwen3-head-dim": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 10, "tie_word_embeddings": True}),
    "qwen3-bias-llama3": (
        "Qwen3",
        {"num_key_value_heads": 4, "head_dim": 16, "attention_bias": True, "rope_parameters": LLAMA3},
    ),
}


def build(family: str, changes: dict, folder: Path, dtype=torch.float32, **save):
    """A random model of that family, saved to `folder`; returns the `transformers` one."""
    settings = {
        "vocab_size": 101,
        "hidden_size": 60 if changes.get("head_dim") else 64,
        "intermediate_size": 91,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "rms_norm_eps": 0.05,  # large enough to be missed
        "initializer_range": 0.2,
    }
    model = library_model(family, settings | changes)
    model.to(dtype).save_pretrained(folder, **save)
    return model


def tokens_of(model, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(model.config.vocab_size, (count,), generator=generator).tolist()


@torch.inference_mode()
def reference(model, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0].float()


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.dtype is torch.float32 and got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()


def after_prefill(model: llama_module.Model, tokens: list[int], rows: int, step: int | None = None) -> torch.Tensor:
    """Logits of the last `rows` tokens, `step` of them (or all) a forward."""
    cache = FullCache(model, len(tokens))
    model.prefill(tokens[:-rows], cache)
    tail = torch.tensor(tokens[-rows:]).split(step or rows)
    logits = torch.cat([model.forward(part.tolist(), cache, len(part)) for part in tail])
    assert cache.length == len(tokens)
    return logits


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(our model, tokens, fp32 logits of `transformers` at every position)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = build(*CASES[request.param], folder)
    tokens = tokens_of(model, 70)
    return load_model(folder, torch.float32, CPU), tokens, reference(model, tokens)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The same for one grouped-query Llama, where the architecture does not matter."""
    folder = tmp_path_factory.mktemp("llama")
    model = build("Llama", {"num_key_value_heads": 2, "num_hidden_layers": 2}, folder)
    tokens = tokens_of(model, 70)
    return load_model(folder, torch.float32, CPU), tokens, reference(model, tokens)


def test_one_forward_from_an_empty_cache(pair):
    model, tokens, expected = pair
    assert error(model.forward(tokens, FullCache(model, len(tokens)), len(tokens)), expected) < 1e-4


@pytest.mark.parametrize("step", [TAIL, 1, 4])
def test_prefill_then_forward(pair, step):
    model, tokens, expected = pair
    assert error(after_prefill(model, tokens, TAIL, step), expected[-TAIL:]) < 1e-4


def test_sharded_checkpoint(tmp_path):
    reference_model = build(*CASES["qwen2-tied"], tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    tokens = tokens_of(reference_model, 20)
    model = load_model(tmp_path, torch.float32, CPU)
    assert error(after_prefill(model, tokens, TAIL), reference(reference_model, tokens)[-TAIL:]) < 1e-4


def test_dynamic_ntk_beyond_the_trained_length(tmp_path):
    changes = {"max_position_embeddings": 32, "rope_parameters": DYNAMIC}
    reference_model = build("Llama", changes, tmp_path)
    tokens = tokens_of(reference_model, 83)
    model, expected = load_model(tmp_path, torch.float32, CPU), reference(reference_model, tokens)
    for total, bound in ((83, 1e-4), (32, None)):
        cache = FullCache(model, capacity=83, total_length=total)
        model.prefill(tokens[:-TAIL], cache)
        got = error(model.forward(tokens[-TAIL:], cache, TAIL), expected[-TAIL:])
        # without the longer base the logits are others, so the first comparison means something
        assert got < bound if bound else got > 1e-2


@pytest.mark.parametrize("block", [7, 1])
def test_a_prompt_of_many_prefill_blocks(llama, monkeypatch, block):
    model, tokens, expected = llama
    monkeypatch.setattr(llama_module, "PREFILL_BLOCK", block)
    calls = []
    cache = FullCache(model, len(tokens))
    model.prefill(tokens[:-TAIL], cache, lambda done, total: calls.append((done, total)))
    blocks, total = 2 * -(-(len(tokens) - TAIL) // block), len(tokens) - TAIL
    assert calls == [(done * total // blocks, total) for done in range(1, blocks + 1)]
    assert error(model.forward(tokens[-TAIL:], cache, TAIL), expected[-TAIL:]) < 1e-4


def test_a_lagging_cache_catches_up_in_blocks(llama):
    model, tokens, expected = llama
    cache = FullCache(model, len(tokens))
    cache.max_rows = 7
    model.prefill(tokens[:5], cache)
    assert error(model.forward(tokens[5:], cache, 4), expected[-4:]) < 1e-4
    assert cache.length == len(tokens)


@pytest.mark.parametrize("steps", [[1] * 6, [6], [2, 4]])
def test_rollback_is_as_if_never_appended(llama, steps):
    model, tokens, _ = llama
    logits = []
    for wrong in ([], [3, 1, 4, 1, 5, 9, 2, 6]):
        cache = FullCache(model, len(tokens))
        model.prefill(tokens[:20], cache)
        if wrong:
            model.forward(wrong, cache, 1)
            cache.length = 20
        at, rows = 20, []
        for step in steps:
            rows.append(model.forward(tokens[at : at + step], cache, step))
            at += step
        logits.append(torch.cat(rows))
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", ["llama-mha-tied", "llama-biases-llama3", "qwen3-head-dim"])
def test_bfloat16_is_as_good_as_transformers(name, tmp_path):
    kind = type(build(*CASES[name], tmp_path, torch.bfloat16))
    # both loaded anew: Module.to would round the rotary frequencies as well
    exact = kind.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = tokens_of(exact, 70)
    truth = reference(exact, tokens)[-TAIL:]
    theirs = reference(kind.from_pretrained(tmp_path, dtype=torch.bfloat16), tokens)[-TAIL:]
    assert error(after_prefill(load_model(tmp_path, torch.float32, CPU), tokens, TAIL), truth) < 1e-4
    model = load_model(tmp_path, torch.bfloat16, CPU)
    for step in (TAIL, 1):
        ours = after_prefill(model, tokens, TAIL, step)
        assert 0 < (ours - truth).norm() < 2 * (theirs - truth).norm()


OLD_STYLE = {
    "theta only": ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
    "null": ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
    "nothing": ({}, {"rope_type": "default", "rope_theta": 1e4}),
    "linear": (
        {"rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_type": "linear", "rope_theta": 2e4, "factor": 4.0},
    ),
    "dynamic": (
        {"rope_theta": 2e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_type": "dynamic", "rope_theta": 2e4, "factor": 2.0},
    ),
    "yarn": (
        {
            "rope_theta": 1e6,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        },
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128},
    ),
    # Llama 3.1 wrote rope_type already, but still inside rope_scaling
    "llama3": (
        {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        LLAMA3 | {"rope_theta": 5e5},
    ),
}


@pytest.mark.parametrize("name", OLD_STYLE)
def test_old_style_rope_keys(name, tmp_path):
    """`rope_scaling` and top-level `rope_theta` mean what `rope_parameters` means, also to `transformers`."""
    old, new = OLD_STYLE[name]
    transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"], max_position_embeddings=512, rope_parameters=dict(new)
    ).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw.pop("rope_parameters") == new
    expected = RopeConfig(
        kind=new["rope_type"],
        theta=new["rope_theta"],
        head_dim=128,
        max_position=512,
        factor=new.get("factor", 1.0),
        original_max_position=new.get("original_max_position_embeddings"),
        low_freq_factor=new.get("low_freq_factor"),
        high_freq_factor=new.get("high_freq_factor"),
    )
    assert parse_config(raw | {"rope_parameters": new}, "new").rope == expected
    assert parse_config(raw | old, "old").rope == expected
    assert transformers.LlamaConfig(**(raw | old)).rope_parameters.items() >= new.items()


@pytest.mark.parametrize(
    "changes, factor, attention_factor, original",
    [
        ({"rope_scaling": {"factor": None, "original_max_position_embeddings": 128}}, 4.0, None, 128),
        ({"rope_scaling": {"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}}, 4.0, 1.0, 512),
        ({"rope_scaling": {"factor": 4.0, "attention_factor": 0.5}}, 4.0, 0.5, 512),
        ({"rope_scaling": {"factor": 4.0}, "original_max_position_embeddings": 64}, 4.0, None, 64),
    ],
)
def test_yarn_options(changes, factor, attention_factor, original):
    raw = transformers.LlamaConfig(architectures=["LlamaForCausalLM"], max_position_embeddings=512).to_dict()
    del raw["rope_parameters"]
    raw |= changes
    rope = parse_config(raw | {"rope_scaling": {"type": "yarn"} | changes["rope_scaling"]}, "yarn").rope
    assert (rope.factor, rope.attention_factor, rope.original_max_position) == (
        factor,
        attention_factor,
        original,
    )
