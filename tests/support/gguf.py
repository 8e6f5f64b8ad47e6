"""GGUF files made of Hugging Face folders, as llama.cpp's converters make them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file

F32 = GGMLQuantizationType.F32
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

# What `get_vocab_base_pre` of llama.cpp's converter hashes the ids of, and the hashes of the original tokenizers.
PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple "
    "emojis concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 "
    "3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
ORIGINALS = {
    "smollm": "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249",
    "llama-bpe": "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5",
    "qwen2": "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea",
    "gpt-2": "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454",
    "starcoder": "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34",
    "refact": "6221ad2852e85ce96f791f476e0b390cf9b474c9e3d1362f53a24a06dc8220ff",
}


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in ENDS:
        return f"{ENDS[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """`LlamaModel.permute` of llama.cpp's converter."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape_as(weight)


def stored_tensors(folder: Path, architecture: str) -> dict[str, np.ndarray]:
    """fp32 tensors of a folder as a GGUF file of that architecture has them."""
    config, found = json.loads((folder / "config.json").read_text()), {}
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, weight in load_file(folder / "model.safetensors").items():
        part = name.split(".")[-2]
        weight = permuted(weight, heads[part]) if architecture == "llama" and part in heads else weight
        found[gguf_name(name)] = weight.float().numpy()
    return found


def metadata_of(folder: Path, architecture: str) -> dict[str, object]:
    """The keys that the converter writes for a folder's config.json, RoPE scaling left out."""
    c = json.loads((folder / "config.json").read_text())
    rope = c.get("rope_parameters") or {"rope_theta": c.get("rope_theta", 10000.0)}
    head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    values = {
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "block_count": c["num_hidden_layers"],
        "feed_forward_length": c["intermediate_size"],
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": c["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": head_dim,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
    }
    return {f"{architecture}.{key}": value for key, value in values.items()}


def write_file(
    path: Path,
    metadata: dict[str, object],
    tensors: dict[str, np.ndarray],
    kind: Callable[[str, np.ndarray], GGMLQuantizationType] = lambda *_: F32,
) -> Path:
    """A GGUF file; `general.architecture` is the prefix of the first key. Tensors of one dimension stay in fp32.

    Metadata that is None is left out.
    """
    writer = GGUFWriter(path, next(iter(metadata)).split(".")[0])
    for key, value in metadata.items():
        add_value(writer, key, value)
    for name, values in tensors.items():
        chosen = kind(name, values) if values.ndim > 1 else F32
        if values.dtype == np.uint8:
            writer.add_tensor(name, values, raw_dtype=chosen)
        else:
            writer.add_tensor(name, quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def write_model(folder: Path, path: Path, architecture: str, more: dict | None = None, **options) -> Path:
    """The model of a Hugging Face folder as a GGUF file. `more` metadata and the tokenizer come on top."""
    metadata = metadata_of(folder, architecture) | (more or {})
    return write_file(path, metadata, stored_tensors(folder, architecture), **options)


def byte_level_metadata(tokenizer_json: Path, pre: str) -> dict[str, object]:
    """`tokenizer.ggml.*` of a byte-level tokenizer.json, as the converter writes it."""
    parsed = json.loads(tokenizer_json.read_text("utf-8"))
    special = {t["id"]: t["special"] for t in parsed["added_tokens"]}
    ids = parsed["model"]["vocab"] | {t["content"]: t["id"] for t in parsed["added_tokens"]}
    tokens = sorted(ids, key=ids.get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [(3 if special[i] else 4) if i in special else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in parsed["model"]["merges"]],
    }


def alphabet() -> dict[str, object]:
    """A byte-level tokenizer of all bytes and nothing but."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = sorted(ByteLevel.alphabet())
    merges = {"tokenizer.ggml.merges": ["a b"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*tokens, "ab"],
        "tokenizer.ggml.token_type": [1] * 257,
    } | merges


def digest_of(found: list[int]) -> str:
    """The hash of a tokenizer's ids of PROBE, as the converter takes it."""
    return hashlib.sha256(str(found).encode()).hexdigest()
