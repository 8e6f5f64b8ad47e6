"""Model folders in and out: configuration, EOS tokens and safetensors weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bdcli.base.digests import file_digest
from bdcli.base.errors import UserError
from bdcli.base.files import digest, new_folder
from bdcli.model.config import ModelConfig, architecture_of, parse_config
from bdcli.model.hub import read_model_json
from bdcli.model.llama import Layer, Model
from bdcli.model.quantised import quantise
from bdcli.model.safetensors_files import EMBEDDING, HEAD, TensorFiles, refuse_adapter

_IDENTITY = (  # what a model is, beside its weights
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "model.safetensors.index.json",
)


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a model folder. Raises UserError on what is no model, or none that can be honoured."""
    refuse_adapter(folder)
    return parse_config(read_model_json(folder / "config.json"), str(folder))


def eos_tokens(folder: Path) -> frozenset[int]:
    """EOS ids of a model: generation_config.json first, as `transformers` has it, else config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        eos = read_model_json(path).get("eos_token_id") if path.exists() else None
        if eos is not None:
            found = eos if isinstance(eos, list) else [eos]
            if not all(type(token) is int for token in found):
                raise UserError(f"{path} has eos_token_id = {eos!r}, not a token id or a list of them", "Correct it")
            return frozenset(found)
    return frozenset()


def text_ends(folder: Path, tokenizer, chat: bool) -> frozenset[int]:
    """Tokens that end a text: the model's EOS, and in a chat the tokenizer's too, which closes a turn."""
    own = getattr(tokenizer, "eos_token_id", None)
    return eos_tokens(folder) | ({own} if chat and own is not None else set())


def load_model(folder: Path, dtype: torch.dtype, device: torch.device, bits: int | None = None) -> Model:
    """Weights from safetensors (one file or shards with an index), cast to `dtype` on `device`.

    With `bits` 4 or 8 each layer is quantised as soon as it is read (`bdcli.model.quantised`).

    Raises UserError naming the file and tensor when something is missing, truncated or of another shape.
    """
    c = read_config(folder)
    weights = TensorFiles(folder, dtype, device)
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


def _load_ends(weights: TensorFiles, c: ModelConfig) -> tuple[Tensor, Tensor]:
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


def _load_layer(weights: TensorFiles, at: str, c: ModelConfig, q_rows: int, kv_rows: int) -> Layer:
    attention, mlp = at + "self_attn.", at + "mlp."
    hidden, inner = c.hidden_size, c.intermediate_size
    qkv = (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows))
    gate_up = (("gate_proj", inner), ("up_proj", inner))
    layer = Layer(
        attention_norm=weights.take(at + "input_layernorm.weight", (hidden,)),
        qkv=torch.cat([weights.take(f"{attention}{n}.weight", (rows, hidden)) for n, rows in qkv]),
        out=weights.take(attention + "o_proj.weight", (hidden, q_rows)),
        mlp_norm=weights.take(at + "post_attention_layernorm.weight", (hidden,)),
        gate_up=torch.cat([weights.take(f"{mlp}{n}.weight", (rows, hidden)) for n, rows in gate_up]),
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


def fingerprint(folder: Path) -> str:
    """Identity of a model: of all bytes of its weights, its configuration, its tokenizer and its EOS tokens."""
    names = [path.name for path in folder.glob("*.safetensors")]
    names += [name for name in _IDENTITY if (folder / name).exists()]
    return digest([(name, file_digest(folder / name)) for name in sorted(names)])


def save_model(model: Model, like: Path, folder: Path) -> None:
    """Write `model` as a Hugging Face folder: weights in bf16, everything but depth copied from the folder `like`.

    The folder appears whole or not at all: it is written beside its place and then renamed.
    """
    from safetensors.torch import save_file

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
    raw = read_model_json(like / "config.json")
    raw |= {
        "architectures": [architecture_of(raw, str(like))],
        "dtype": "bfloat16",
        "num_hidden_layers": c.layers,
        "tie_word_embeddings": c.tied_head,
    }
    if raw.get("layer_types") is not None:
        raw["layer_types"] = (raw["layer_types"] + raw["layer_types"][-1:] * c.layers)[: c.layers]
    with new_folder(folder) as fresh:
        for path in like.iterdir():
            if path.suffix in (".json", ".model", ".jinja") and not path.name.endswith(".index.json"):
                shutil.copy(path, fresh)
        (fresh / "config.json").write_text(json.dumps(raw, indent=2), "utf-8")
        save_file(flat, fresh / "model.safetensors", {"format": "pt"})
