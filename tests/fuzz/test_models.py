"""Files of models: whatever config.json or a safetensors header says, a model comes of it or one UserError."""

import json
import math
import struct
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdcli.base.errors import UserError
from bdcli.model.build import random_model
from bdcli.model.checkpoint import load_model, read_config, save_model
from bdcli.model.config import ModelConfig, parse_config
from bdcli.model.hub import POCKET
from tests.support.fuzz import JSON, fuzz, mutated

COMMON = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 32.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}  # fmt: skip
CONFIGS = [
    json.loads((POCKET / "target" / "config.json").read_text()),
    COMMON | {"architectures": ["LlamaForCausalLM"], "rope_theta": 5e5, "rope_scaling": LLAMA3, "model_type": "llama"},
    COMMON | {"architectures": ["MistralForCausalLM"], "sliding_window": 4096, "model_type": "mistral"},
    COMMON | {"architectures": ["Qwen2ForCausalLM"], "rope_scaling": YARN, "use_sliding_window": False},
    COMMON | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32, "rope_parameters": {"rope_theta": 1e6} | YARN},
]
KEYS = sorted({key for config in CONFIGS for key in config} | {"head_dim", "attention_bias", "mlp_bias", "layer_types"})
ROPE_KEYS = sorted({*YARN, *LLAMA3, "type", "attention_factor", "rope_theta", "truncate"})
NUMBERS = st.integers(-3, 9) | st.floats() | st.sampled_from([2**31, 2**62, 2**63, 10**30, "4", None, True, [4], {}])


@st.composite
def edited_configs(draw):
    config = json.loads(json.dumps(draw(st.sampled_from(CONFIGS))))
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(KEYS))
        inner = [name for name in ("rope_scaling", "rope_parameters") if isinstance(config.get(name), dict)]
        holder = config[draw(st.sampled_from(inner))] if inner and draw(st.booleans()) else config
        key = key if holder is config else draw(st.sampled_from(ROPE_KEYS))
        if draw(st.integers(0, 3)) == 0:
            holder.pop(key, None)
        else:
            holder[key] = draw(NUMBERS | JSON)
    return config


def assert_sound(config: ModelConfig) -> None:
    """Its numbers are what a model can be made of."""
    for name in ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim"):
        value = getattr(config, name)
        assert type(value) is int and value > 0, (name, value)
    assert type(config.max_position) is int and config.max_position > 0
    assert config.sliding_window is None or (type(config.sliding_window) is int and config.sliding_window > 0)
    for value in (config.norm_eps, *(v for v in asdict(config.rope).values() if not isinstance(v, (str, bool)))):
        assert value is None or (isinstance(value, (int, float)) and math.isfinite(value)), config
    assert config.heads % config.kv_heads == 0 and config.head_dim % 2 == 0


@fuzz(400)
@given(edited_configs())
def test_an_edited_configuration_is_read_or_refused(raw):
    try:
        assert_sound(parse_config(raw, "here"))
    except UserError as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder of a tiny model."""
    like, folder = tmp_path_factory.mktemp("like"), tmp_path_factory.mktemp("tiny") / "model"
    small = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    raw = CONFIGS[0] | small | {"num_attention_heads": 2, "num_key_value_heads": 1}
    (like / "config.json").write_text(json.dumps(raw))
    save_model(random_model(read_config(like), 0), like, folder)
    return folder


def load(folder, body):
    """The model of a folder whose weights are `body`; None where it was refused."""
    (folder / "model.safetensors").write_bytes(body)
    try:
        model = load_model(folder, torch.float32, torch.device("cpu"))
    except UserError as error:
        assert "model" in str(error)
        return None
    return model


@pytest.fixture(scope="module")
def weights(tiny):
    return (tiny / "model.safetensors").read_bytes()


@fuzz(150)
@given(st.data())
def test_edited_weights_load_or_are_refused(tiny, weights, data):
    size = 8 + struct.unpack("<Q", weights[:8])[0]
    head = data.draw(mutated(weights[:size]))
    model = load(tiny, head + weights[size:])
    assert model is None or all(tensor.dtype == torch.float32 for tensor in model.tensors())


@fuzz(150)
@given(st.data())
def test_a_header_that_lies_is_refused(tiny, weights, data):
    """Offsets, shapes and dtypes of a header that is sound as JSON."""
    size = struct.unpack("<Q", weights[:8])[0]
    header = json.loads(weights[8 : 8 + size])
    name = data.draw(st.sampled_from(sorted(header)))
    kind = data.draw(st.sampled_from(["data_offsets", "shape", "dtype", "name", "gone", "value"]))
    number = st.integers(-2, 600) | st.sampled_from([2**31, 2**63, 2**64, 1.5, None, "1"])
    if kind in ("data_offsets", "shape"):
        header[name][kind] = data.draw(st.lists(number, max_size=3))
    elif kind == "dtype":
        header[name][kind] = data.draw(st.sampled_from(["F32", "I8", "BF16", "F8_E4M3", "BOOL", "X", 3, None]))
    elif kind == "gone":
        del header[name]
    else:
        header[name if kind == "value" else data.draw(st.text(max_size=4))] = data.draw(JSON)
    written = json.dumps(header).encode()
    said = data.draw(st.just(len(written)) | st.integers(0, 2**64 - 1))
    model = load(tiny, struct.pack("<Q", said) + written + weights[8 + size :])
    assert model is None or [t.shape for t in model.tensors()] == [t.shape for t in load(tiny, weights).tensors()]


@fuzz(30)
@given(st.integers(0, 3000))
def test_weights_that_are_cut_short_are_refused(tiny, weights, size):
    assert load(tiny, weights[: min(size, len(weights) - 1)]) is None
