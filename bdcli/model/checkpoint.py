"""Models in and out: configuration, EOS tokens and weights, from what `resolve` finds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from bdcli.base.files import new_folder
from bdcli.model.config import ModelConfig, architecture_of, parse_config
from bdcli.model.llama import Layer, Model
from bdcli.model.quantised import Weight, quantise, stack
from bdcli.model.safetensors_files import EMBEDDING, HEAD
from bdcli.model.source import Weights, open_source


def read_config(path: Path) -> ModelConfig:
    """Configuration of a folder or a GGUF file. Raises UserError on what is no model, or none that can be honoured."""
    return parse_config(open_source(path).config(), str(path))


def eos_tokens(path: Path) -> frozenset[int]:
    """Ids that end a text of the model."""
    return open_source(path).eos()


def text_ends(path: Path, tokenizer, chat: bool) -> frozenset[int]:
    """Tokens that end a text: the model's EOS, and in a chat the tokenizer's too, which closes a turn."""
    own = getattr(tokenizer, "eos_token_id", None)
    return eos_tokens(path) | ({own} if chat and own is not None else set())


def kept_codes(path: Path, number_bytes: int) -> tuple[int, int] | None:
    """(bytes of the weights, bits of a layer's codes) of a GGUF file loaded with `keep_codes`; None of dense ones."""
    return open_source(path).codes(number_bytes)


def load_model(
    path: Path, dtype: torch.dtype, device: torch.device, bits: int | None = None, keep_codes: bool = False
) -> Model:
    """Weights from safetensors (one file or shards with an index) or a GGUF file, cast to `dtype` on `device`.

    With `bits` 4 or 8 each layer is quantised as soon as it is read (`bdcli.model.quantised`). With `keep_codes`
    matrices that a GGUF file has in codes stay in them, on a CPU.

    Raises UserError naming the file and tensor when something is missing, truncated or of another shape.
    """
    c = read_config(path)
    weights = open_source(path).weights(dtype, device, keep_codes)
    hidden, q_rows, kv_rows = c.hidden_size, c.heads * c.head_dim, c.kv_heads * c.head_dim
    embedding, head = _load_ends(weights, c)
    layers = []
    for i in range(c.layers):
        layer = _load_layer(weights, f"model.layers.{i}.", c, q_rows, kv_rows)
        layers.append(layer if bits is None else layer.quantised(bits))
    norm = weights.take("model.norm.weight", (hidden,))
    weights.expect_empty()
    tied = head is embedding
    if bits is not None:
        embedding = quantise(embedding, 8)
        head = embedding if tied else quantise(head, 8)
    return Model(replace(c, tied_head=tied), embedding, layers, norm, head)


def _load_ends(weights: Weights, c: ModelConfig) -> tuple[Weight, Weight]:
    """Embedding and head. Tied ones are one tensor, stored under either name; two that differ are not tied."""
    shape = c.vocab_size, c.hidden_size
    if c.tied_head and EMBEDDING not in weights and HEAD in weights:
        embedding = head = weights.take(HEAD, shape)
        return embedding, head
    embedding = weights.take(EMBEDDING, shape)
    if c.tied_head and HEAD not in weights:
        return embedding, embedding
    head = weights.take(HEAD, shape)
    return embedding, embedding if c.tied_head and torch.equal(head, embedding) else head


def _load_layer(weights: Weights, at: str, c: ModelConfig, q_rows: int, kv_rows: int) -> Layer:
    attention, mlp = at + "self_attn.", at + "mlp."
    hidden, inner = c.hidden_size, c.intermediate_size
    qkv = (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows))
    gate_up = (("gate_proj", inner), ("up_proj", inner))
    layer = Layer(
        attention_norm=weights.take(at + "input_layernorm.weight", (hidden,)),
        qkv=stack([weights.take(f"{attention}{n}.weight", (rows, hidden)) for n, rows in qkv], weights.dtype),
        out=weights.take(attention + "o_proj.weight", (hidden, q_rows)),
        mlp_norm=weights.take(at + "post_attention_layernorm.weight", (hidden,)),
        gate_up=stack([weights.take(f"{mlp}{n}.weight", (rows, hidden)) for n, rows in gate_up], weights.dtype),
        down=weights.take(mlp + "down_proj.weight", (hidden, inner)),
    )
    if c.qkv_bias:
        layer.qkv_bias = torch.cat([weights.take(f"{attention}{n}.bias", (rows,)) for n, rows in qkv])
    if c.out_bias:
        layer.out_bias = weights.take(attention + "o_proj.bias", (hidden,))
    if c.mlp_bias:
        layer.gate_up_bias = torch.cat([weights.take(f"{mlp}{n}.bias", (rows,)) for n, rows in gate_up])
        layer.down_bias = weights.take(mlp + "down_proj.bias", (hidden,))
    if c.qk_norm:
        q_norm = weights.take(attention + "q_norm.weight", (c.head_dim,))
        k_norm = weights.take(attention + "k_norm.weight", (c.head_dim,))
        layer.qk_norm = torch.cat((q_norm.expand(c.heads, -1), k_norm.expand(c.kv_heads, -1)))
    return layer


def fingerprint(path: Path) -> str:
    """Identity of a model: of all bytes of its weights, its configuration, its tokenizer and its EOS tokens."""
    return open_source(path).fingerprint()


def save_model(model: Model, like: Path, folder: Path) -> None:
    """Write `model` as a Hugging Face folder: weights in bf16, everything but depth taken from the model `like`.

    The folder appears whole or not at all: it is written beside its place and then renamed.
    """
    from safetensors.torch import save_file

    model = model.dense()
    c, weights = model.config, {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm}
    rows = (c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim)
    if not c.tied_head:
        weights["lm_head.weight"] = model.head
    for i, layer in enumerate(model.layers):
        at = f"model.layers.{i}."
        weights[at + "input_layernorm.weight"] = layer.attention_norm
        weights[at + "post_attention_layernorm.weight"] = layer.mlp_norm
        for kind in ("weight", "bias"):
            end = "" if kind == "weight" else "_bias"
            whole = {"self_attn.o_proj": getattr(layer, "out" + end), "mlp.down_proj": getattr(layer, "down" + end)}
            qkv, gate_up = getattr(layer, "qkv" + end), getattr(layer, "gate_up" + end)
            if qkv is not None:
                whole |= dict(zip((f"self_attn.{n}_proj" for n in "qkv"), qkv.split(rows), strict=True))
            if gate_up is not None:
                whole |= dict(zip(("mlp.gate_proj", "mlp.up_proj"), gate_up.chunk(2), strict=True))
            weights |= {f"{at}{name}.{kind}": t for name, t in whole.items() if t is not None}
        if layer.qk_norm is not None:
            weights[at + "self_attn.q_norm.weight"] = layer.qk_norm[0]
            weights[at + "self_attn.k_norm.weight"] = layer.qk_norm[c.heads]
    flat = {name: t.detach().to("cpu", torch.bfloat16).contiguous().clone() for name, t in weights.items()}
    source = open_source(like)
    raw = source.config()
    raw |= {
        "architectures": [architecture_of(raw, str(like))],
        "dtype": "bfloat16",
        "num_hidden_layers": c.layers,
        "tie_word_embeddings": c.tied_head,
    }
    if raw.get("layer_types") is not None:
        raw["layer_types"] = (raw["layer_types"] + raw["layer_types"][-1:] * c.layers)[: c.layers]
    with new_folder(folder) as fresh:
        source.write_files(fresh)
        (fresh / "config.json").write_text(json.dumps(raw, indent=2), "utf-8")
        save_file(flat, fresh / "model.safetensors", {"format": "pt"})
