"""Keys of config.json mean what the classes of `transformers` take them to mean, or are refused by name."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from bdcli.base.errors import UserError
from bdcli.model.config import CLASS_DEFAULTS, SUPPORTED, ModelConfig, parse_config
from bdcli.model.rope import frequencies

FAMILIES = [name.removesuffix("ForCausalLM") for name in SUPPORTED]
SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 90,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
KEYS = (*SIZES, *CLASS_DEFAULTS["Qwen2ForCausalLM"], "rope_theta", "rope_scaling", "rope_parameters")
VALUES = (..., None, "8", [], {}, [[1]], True, False, 0, -1, 1, 2, 8, 2.0, 0.5)


def raw_config(family: str, **changes: object) -> dict:
    """Of a small model; `...` drops a key."""
    raw = SIZES | {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower()} | changes
    return {key: value for key, value in raw.items() if value is not ...}


def ours(family: str, **changes: object) -> ModelConfig:
    return parse_config(raw_config(family, **changes), "here")


def theirs(family: str, **changes: object):
    raw = raw_config(family, **changes)
    return getattr(transformers, f"{family}Config").from_dict(raw)


def as_theirs(config) -> dict[str, object]:
    """Fields of ours by what they are of a `transformers` configuration."""
    window = getattr(config, "sliding_window", None)
    slides = not config.model_type.startswith("qwen") or "sliding_attention" in config.layer_types
    if not config.model_type.startswith("qwen"):  # as the caches of `transformers` read them
        window = window or getattr(config, "attention_chunk_size", None)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "max_position": config.max_position_embeddings,
        "norm_eps": config.rms_norm_eps,
        "tied_head": config.tie_word_embeddings,
        "sliding_window": window if slides else None,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_the_class(family):
    whole = getattr(transformers, f"{family}Config")
    fields = {name: f.default for name, f in whole.__dataclass_fields__.items()}
    known = CLASS_DEFAULTS[f"{family}ForCausalLM"]
    assert {key: fields[key] for key in known if key in fields} == {k: v for k, v in known.items() if k in fields}
    assert {"num_key_value_heads", "max_position_embeddings", "rms_norm_eps"} <= known.keys() & fields.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_is_read_as_the_class_reads_it_or_refused(family):
    equal = 0
    for key, value in itertools.product(KEYS, VALUES):
        try:
            config = ours(family, **{key: value})
        except UserError as error:
            assert key in str(error) or "do not fit" in str(error) or key == "hidden_act", (key, value, str(error))
            assert error.exit_code == 2 and "\n" not in str(error)
            continue
        try:
            law = as_theirs(theirs(family, **{key: value}))
        except Exception:  # refused there, in many ways
            continue
        assert {name: getattr(config, name) for name in law} == law, (key, value)
        equal += 1
    assert equal > 40


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_left_out_is_the_default_of_the_class(family):
    for key in KEYS:
        try:
            config = ours(family, **{key: ...})
        except UserError as error:
            assert f"config.json lacks '{key}'" in str(error) or "do not fit" in str(error)
            continue
        law = as_theirs(theirs(family, **{key: ...}))
        assert {name: getattr(config, name) for name in law} == law, key


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = (
    ...,
    None,
    {},
    {"rope_type": "default", "rope_theta": 777.0},
    {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "factor": 2.0, "rope_theta": 5000.0},
    {"type": "linear", "rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 64},
    LLAMA3 | {"original_max_position_embeddings": 64},
    LLAMA3,
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 96},
    {"rope_type": "yarn", "factor": 4, "beta_fast": None, "beta_slow": 2, "truncate": False},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 0.3},
    {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5},
)


@pytest.mark.parametrize("scaling", range(len(SCALINGS)))
@pytest.mark.parametrize("parameters", range(len(SCALINGS)))
def test_the_rope_key_that_wins_is_the_one_that_transformers_reads(scaling, parameters):
    for theta, original in itertools.product((..., 2000.0), (..., 80)):
        changes = {"rope_scaling": SCALINGS[scaling], "rope_parameters": SCALINGS[parameters]}
        changes |= {"rope_theta": theta, "original_max_position_embeddings": original, "max_position_embeddings": 256}
        copies = [{k: dict(v) if isinstance(v, dict) else v for k, v in changes.items()} for _ in range(2)]
        law = LlamaRotaryEmbedding(theirs("Llama", **copies[0]))
        inverse, scale = frequencies(ours("Llama", **copies[1]).rope, 100)
        assert torch.allclose(inverse, law.inv_freq, rtol=1e-5) and scale == pytest.approx(law.attention_scaling)


@pytest.mark.parametrize(
    "changes, limit",
    [
        ({}, 1024),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 4096),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.5}}, 2560),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}, 4096),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 512}, 2048),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 64}, 1024),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 512}}, 1024),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "sliding_window": 300}, 300),
    ],
)
def test_a_scaled_context_reaches_factor_times_its_original(changes, limit):
    assert ours("Llama", max_position_embeddings=1024, **changes).context_limit == limit


@pytest.mark.parametrize(
    "family, changes, expected",
    [
        ("Mistral", {"sliding_window": 64}, 64),
        ("Mistral", {"sliding_window": None}, None),
        ("Mistral", {}, 4096),
        ("Qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, 64),
        ("Qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3}, None),
        ("Qwen2", {"sliding_window": 64, "use_sliding_window": True}, None),  # from layer 28 on
        ("Qwen2", {"use_sliding_window": True, "max_window_layers": 0}, 4096),
        ("Qwen2", {"sliding_window": 64, "use_sliding_window": False, "max_window_layers": 0}, None),
        ("Qwen3", {"sliding_window": 64, "max_window_layers": 0}, None),
        ("Qwen3", {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["full_attention"] * 3}, None),
        (
            "Qwen3",
            {
                "sliding_window": 64,
                "use_sliding_window": True,
                "layer_types": ["full_attention"] * 2 + ["sliding_attention"],
            },
            64,
        ),
        ("Llama", {"sliding_window": 64}, 64),  # the caches of `transformers` slide
        ("Llama", {"attention_chunk_size": 64}, 64),
        ("Llama", {}, None),
    ],
)
def test_sliding_window(family, changes, expected):
    assert ours(family, **changes).sliding_window == expected


@pytest.mark.parametrize(
    "family, changes, parts",
    [
        ("Qwen2", {"layer_types": ["sliding_attention"] * 3}, ["layer_types"]),
        ("Qwen2", {"layer_types": ["full_attention"] * 2}, ["layer_types", "3 of"]),
        ("Llama", {"layer_types": ["linear_attention"] * 3}, ["layer_types"]),
        ("Llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["rope_parameters"]),
        ("Llama", {"rope_scaling": "linear"}, ["rope_scaling"]),
        ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": "4"}}, ["factor = '4'"]),
        ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": [4.0]}}, ["factor = [4.0]"]),
        ("Llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": "32"}}, ["beta_fast = '32'"]),
        ("Llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": None}}, ["high_freq_factor = None"]),
        ("Llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": 0.5}}, ["high_freq_factor", "above"]),
        ("Llama", {"rope_theta": None}, ["rope_theta = None"]),
        ("Llama", {"max_position_embeddings": "16896"}, ["max_position_embeddings = '16896'"]),
        ("Llama", {"rms_norm_eps": float("nan")}, ["rms_norm_eps = nan"]),
        ("Llama", {"tie_word_embeddings": "true"}, ["tie_word_embeddings = 'true'"]),
        ("Llama", {"architectures": "LlamaForCausalLM"}, ["architectures"]),
        ("Llama", {"architectures": [7]}, ["architectures"]),
        ("Llama", {"model_type": "mistral"}, ["LlamaForCausalLM", "'mistral'"]),
        ("Llama", {"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
        ("Llama", {"architectures": ["LlamaForCausalLMEagle3"]}, ["EAGLE"]),
        ("Llama", {"draft_vocab_size": 32}, ["EAGLE"]),
        ("Llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantised (gptq)", "bfloat16"]),
        ("Llama", {"quantization_config": {"quant_method": "awq"}}, ["quantised (awq)"]),
        ("Llama", {"quantization_config": {"quant_method": "fp8"}}, ["quantised (fp8)"]),
        ("Llama", {"quantization_config": {"load_in_4bit": True}}, ["quantised (bitsandbytes)"]),
        ("Llama", {"quantization": {"group_size": 64, "bits": 4}}, ["quantised (MLX)"]),
        ("Llama", {"rope_theta": 10**400}, ["rope_theta = 1000"]),
        ("Llama", {"transformers_weights": "other.safetensors"}, ["transformers_weights"]),
        ("Llama", {"per_layer_config": {"0": {"intermediate_size": 8}}}, ["per_layer_config"]),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(family, changes, parts):
    with pytest.raises(UserError) as error:
        ours(family, **changes)
    assert not [part for part in parts if part not in str(error.value)], str(error.value)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_the_class_is_that_of_model_type_where_no_architecture_is_named():
    for family in FAMILIES:
        named, unnamed = ours(family), ours(family, architectures=...)
        assert named == unnamed == ours(family, architectures=None) == ours(family, model_type=...)
        assert named == ours(family, architectures=[f"{family}Model"])


def test_biases_that_a_class_does_not_have_are_not_asked_for():
    biases = {"attention_bias": True, "mlp_bias": True}
    found = {family: ours(family, **biases) for family in FAMILIES}
    assert {f: (c.qkv_bias, c.out_bias, c.mlp_bias) for f, c in found.items()} == {
        "Llama": (True, True, True),
        "Mistral": (False, False, False),
        "Qwen2": (True, False, False),
        "Qwen3": (True, True, False),
    }
