"""Models in GGUF files: the same logits as their Hugging Face folders, and as transformers."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from bdcli.cache.full import FullCache
from bdcli.model.checkpoint import eos_tokens, fingerprint, kept_codes, load_model, read_config, save_model
from bdcli.model.hub import POCKET
from bdcli.model.quantised import QuantisedMatrix
from bdcli.model.tokenizer import check_vocabulary, load_tokenizer
from tests.support.gguf import alphabet, byte_level_metadata, metadata_of, stored_tensors, write_file, write_model
from tests.support.models import library_model

CPU = torch.device("cpu")
TOKENS = [int(x) for x in torch.randint(0, 96, (70,), generator=torch.Generator().manual_seed(3))]
FAMILIES = {  # of `transformers`, with the architecture of the GGUF file
    "llama": ("Llama", "llama", {}),
    "llama grouped": ("Llama", "llama", {"num_key_value_heads": 2}),
    "llama tied": ("Llama", "llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama with biases": ("Llama", "llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", "llama", {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": None}),
    "qwen2": ("Qwen2", "qwen2", {"num_key_value_heads": 2}),
    "qwen2 tied": ("Qwen2", "qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", "qwen3", {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True}),
    "qwen3 with biases": ("Qwen3", "qwen3", {"num_key_value_heads": 2, "head_dim": 16, "attention_bias": True}),
}


def build(folder, family: str, changes: dict):
    """A random model of `transformers`, saved in fp32."""
    settings = {
        "vocab_size": 264, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 0.05,
        "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    model = library_model(family, settings | changes)
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def theirs(model) -> torch.Tensor:
    return model(torch.tensor([TOKENS])).logits[0].float()


def ours(path, **options) -> torch.Tensor:
    model = load_model(path, torch.float32, CPU, **options)
    return model.forward(TOKENS, FullCache(model, len(TOKENS)), len(TOKENS))


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_is_the_folder_it_was_made_of(tmp_path, name):
    family, architecture, changes = FAMILIES[name]
    model = build(tmp_path / "hf", family, changes)
    path = write_model(tmp_path / "hf", tmp_path / "m.gguf", architecture)
    ours_of_folder = load_model(tmp_path / "hf", torch.float32, CPU)
    for a, b in zip(ours_of_folder.tensors(), load_model(path, torch.float32, CPU).tensors(), strict=True):
        assert torch.equal(a, b)
    got, want = read_config(path), read_config(tmp_path / "hf")
    assert got == want, (got, want)
    assert error(ours(path), theirs(model)) < 1e-4


KINDS = {
    "llama grouped": Kind.Q8_0, "llama tied": Kind.Q4_1, "qwen2": Kind.Q4_0, "qwen2 tied": Kind.Q5_1,
    "qwen3": Kind.Q5_0, "mistral": Kind.BF16,
}  # fmt: skip


@torch.no_grad()
def rounded(model, kind: Kind):
    """The model with its matrices as the `gguf` package stores and reads them."""
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.copy_(torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind)))
    return model


@pytest.mark.parametrize("name", KINDS)
def test_codes_mean_what_the_gguf_package_makes_of_them(tmp_path, name):
    family, architecture, changes = FAMILIES[name]
    model = build(tmp_path / "hf", family, changes)
    path = write_model(tmp_path / "hf", tmp_path / "m.gguf", architecture, kind=lambda *_: KINDS[name])
    exact = theirs(model)
    want = theirs(rounded(model, KINDS[name]))
    assert error(want, exact) > 1e-3
    assert error(ours(path), want) < 1e-4
    coded = load_model(path, torch.float32, CPU, keep_codes=True)
    assert isinstance(coded.layers[0].down, QuantisedMatrix) == (KINDS[name] is not Kind.BF16)
    planned = kept_codes(path, 4)
    assert (planned is None) == (KINDS[name] is Kind.BF16)
    if planned is not None:  # rows are filled up to panels of sixteen
        assert planned[1] == coded.layers[0].down.format.bits
        assert 0.95 * coded.weight_bytes <= planned[0] <= coded.weight_bytes
    assert error(ours(path, keep_codes=True), want) < 1e-4


def test_layers_may_mix_types(tmp_path):
    build(tmp_path / "hf", "Llama", {"num_key_value_heads": 2, "hidden_size": 256, "num_attention_heads": 8})
    kinds = {"attn_v": Kind.Q8_0, "attn_q": Kind.Q4_0, "attn_k": Kind.Q4_1, "ffn_up": Kind.F16, "ffn_gate": Kind.Q5_1}

    def kind(name, _):
        return next((k for part, k in kinds.items() if part in name), Kind.Q8_0)

    path = write_model(tmp_path / "hf", tmp_path / "m.gguf", "llama", kind=kind)
    coded = load_model(path, torch.float32, CPU, keep_codes=True)
    dense = load_model(path, torch.float32, CPU)
    for a, b in zip(coded.dense().tensors(), dense.tensors(), strict=True):
        assert torch.equal(a, b)
    assert isinstance(coded.layers[1].qkv, QuantisedMatrix) and isinstance(coded.layers[1].gate_up, torch.Tensor)


YARN = {"rope_type": "yarn", "rope_theta": 200.0, "factor": 4.0, "original_max_position_embeddings": 128}
SCALED = {
    "linear": (
        {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.5},
        {"scaling.type": "linear", "scaling.factor": 2.5},
    ),
    "linear, as old files have it": (
        {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
        {"scale_linear": 2.0},
    ),
    "yarn": (YARN, {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 128}),
    "yarn with all its settings": (
        YARN | {"beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.5},
        {
            "scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 128,
            "scaling.yarn_beta_fast": 4.0, "scaling.yarn_beta_slow": 0.5, "scaling.yarn_attn_factor": 1.5,
        },
    ),
    "yarn with mscale": (
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
        {
            "scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 128,
            "scaling.yarn_log_multiplier": 0.5,
        },
    ),
    "none": ({"rope_type": "default", "rope_theta": 700.0}, {"scaling.type": "none", "scaling.factor": 3.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_positions_are_scaled_as_in_transformers(tmp_path, name):
    rope, keys = SCALED[name]
    model = build(tmp_path / "hf", "Llama", {"num_key_value_heads": 2, "rope_parameters": rope})
    keys = {f"llama.rope.{key}": value for key, value in keys.items()}
    path = write_model(tmp_path / "hf", tmp_path / "m.gguf", "llama", keys | alphabet())
    assert error(ours(path), theirs(model)) < 1e-4
    save_model(load_model(path, torch.bfloat16, CPU), path, tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert error(ours(tmp_path / "back"), theirs(back)) < 1e-4


def llama3_divisors(rope: dict, head_dim: int) -> list[float]:
    """`LlamaModel.generate_extra_tensors` of llama.cpp's converter."""
    original, low, high = (rope[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        smooth = (original / wavelength - low) / (high - low)
        smooth = min(max(smooth, 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return divisors


def test_divisors_of_llama_3_are_honoured_and_survive_a_conversion(tmp_path, cli):
    rope = {
        "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    model = build(tmp_path / "hf", "Llama", {"num_key_value_heads": 2, "rope_parameters": rope})
    tensors = stored_tensors(tmp_path / "hf", "llama")
    plain = write_model(tmp_path / "hf", tmp_path / "plain.gguf", "llama")
    tensors["rope_freqs.weight"] = torch.tensor(llama3_divisors(rope, 16)).numpy()
    metadata = metadata_of(tmp_path / "hf", "llama")
    path = write_file(tmp_path / "m.gguf", metadata, tensors)
    assert error(ours(plain), theirs(model)) > 1e-2
    assert error(ours(path), theirs(model)) < 1e-4
    assert read_config(path).rope.kind == "longrope"
    done = cli("convert", path, tmp_path / "back")
    assert done.code == 2 and "holds no tokenizer" in done.err and not (tmp_path / "back").exists()
    write_file(path, metadata | alphabet(), tensors)
    done = cli("convert", path, tmp_path / "back")
    assert done.code == 0, done.err
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert error(theirs(back), theirs(model)) < 0.05  # bf16
    assert error(ours(tmp_path / "back"), theirs(back)) < 1e-4


def pocket_tokenizer() -> dict:
    ids = {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.add_bos_token": False}
    return byte_level_metadata(POCKET / "target" / "tokenizer.json", "gpt-2") | ids


@pytest.fixture(scope="module")
def pocket_files(tmp_path_factory):
    """The pocket pair as GGUF files, and the target's in Q8_0."""
    folder = tmp_path_factory.mktemp("pocket")
    for role in ("target", "drafter"):
        write_model(POCKET / role, folder / f"{role}.gguf", "llama", pocket_tokenizer(), kind=lambda *_: Kind.BF16)
    write_model(POCKET / "target", folder / "q8.gguf", "llama", pocket_tokenizer(), kind=lambda *_: Kind.Q8_0)
    return folder


def test_the_pocket_pair_decodes_from_files(pocket_files, tmp_path, cli):
    prompt = tmp_path / "prompt.txt"
    assert cli("prompt", "--ctx", 300, "--target", pocket_files / "target.gguf", "--out", prompt).code == 0
    same = ["--max-new-tokens", 24, "--gamma", 3, "--dtype", "float32", "--json", "--check", prompt]
    files = cli("decode", "--target", pocket_files / "target.gguf", "--drafter", pocket_files / "drafter.gguf", *same)
    want = cli("decode", *same)
    assert files.code == 0, files.err
    assert files.json["tokens"] == want.json["tokens"] and files.json["accepted"] == want.json["accepted"]
    assert files.json["target"] == str((pocket_files / "target.gguf").resolve())
    mixed = cli("decode", "--target", pocket_files / "q8.gguf", *same)
    assert mixed.code == 0 and mixed.json["output_equal"], mixed.err


def test_a_file_has_all_that_a_folder_has(pocket_files, tmp_path, cli):
    path = pocket_files / "target.gguf"
    assert eos_tokens(path) == eos_tokens(POCKET / "target") == {1}
    check_vocabulary(path, POCKET / "drafter", load_tokenizer(path))
    copy = tmp_path / "other-name.gguf"
    copy.write_bytes(path.read_bytes())
    assert fingerprint(copy) == fingerprint(path) != fingerprint(pocket_files / "q8.gguf")
    done = cli("convert", path, tmp_path / "folder")
    assert done.code == 0 and done.out.strip() == str(tmp_path / "folder"), done.err
    for a, b in zip(
        load_model(POCKET / "target", torch.float32, CPU).tensors(),
        load_model(tmp_path / "folder", torch.float32, CPU).tensors(),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert read_config(tmp_path / "folder") == read_config(POCKET / "target")
    assert eos_tokens(tmp_path / "folder") == {1}
    assert json.loads((tmp_path / "folder" / "generation_config.json").read_text()) == {
        "bos_token_id": 0,
        "eos_token_id": [1],
    }
    text = "def f(x):\n    return x  # ½ 漢字 🙂 1234\n"
    assert load_tokenizer(tmp_path / "folder")(text)["input_ids"] == load_tokenizer(path)(text)["input_ids"]


def test_peers_are_not_given_files(pocket_files, cli):
    """transformers would read the file in its own way, so that its figures were those of another model."""
    done = cli("bench", "--target", pocket_files / "target.gguf", "--ctx", 200, "--methods", "ar,bd,hf-ar", "--dry-run")
    assert done.code == 2 and "hf-ar runs transformers" in done.err and "bdcli convert" in done.err
    done = cli("bench", "--target", pocket_files / "target.gguf", "--ctx", 200, "--methods", "ar,bd", "--dry-run")
    assert done.code == 0, done.err
