"""A model from nothing, or of another depth: configuration, byte-level BPE tokenizer, first weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bdcli.checkpoint import load_model, save_model
from bdcli.config import ModelConfig, parse_config
from bdcli.model import Layer, Model
from bdcli.train.pretrain_recipe import Shape

SPECIAL = ("<s>", "</s>")  # ids 0 and 1; the tokenizer adds neither by itself
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json")


def write_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int) -> None:
    """Train a byte-level BPE of `vocab_size` entries on `texts` and write it as `transformers` reads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), "utf-8")


def copy_tokenizer(source: Path, folder: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, folder)


def write_config(folder: Path, shape: Shape, vocab_size: int, bos: int | None, eos: int | None) -> ModelConfig:
    """config.json and generation_config.json of a Llama with tied head."""
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden_size // shape.heads,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_position,
        "rms_norm_eps": 1e-5,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(raw, indent=2), "utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": bos, "eos_token_id": eos}), "utf-8")
    return parse_config(raw, str(folder))


def random_model(
    c: ModelConfig, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Model:
    """Normal weights of deviation 1/√fan-in, those that write to the residual stream 1/√(2·layers) of it; no biases."""
    g = torch.Generator(device).manual_seed(seed)
    embedding = torch.randn(c.vocab_size, c.hidden_size, generator=g, dtype=dtype, device=device) * 0.02
    layers = [_random_layer(c, g, dtype) for _ in range(c.layers)]
    norm = torch.ones(c.hidden_size, dtype=dtype, device=device)
    head = embedding if c.tied_head else _random_matrix(c.vocab_size, c.hidden_size, g, dtype)
    return Model(c, embedding, layers, norm, head)


def _random_layer(c: ModelConfig, g: torch.Generator, dtype: torch.dtype) -> Layer:
    hidden, inner, q_rows = c.hidden_size, c.intermediate_size, c.heads * c.head_dim
    shrink = (2 * c.layers) ** -0.5
    return Layer(
        attention_norm=torch.ones(hidden, dtype=dtype, device=g.device),
        qkv=_random_matrix(q_rows + 2 * c.kv_heads * c.head_dim, hidden, g, dtype),
        out=_random_matrix(hidden, q_rows, g, dtype, shrink),
        mlp_norm=torch.ones(hidden, dtype=dtype, device=g.device),
        gate_up=_random_matrix(2 * inner, hidden, g, dtype),
        down=_random_matrix(hidden, inner, g, dtype, shrink),
    )


def _random_matrix(rows: int, columns: int, g: torch.Generator, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return torch.randn(rows, columns, generator=g, dtype=dtype, device=g.device) * (scale * columns**-0.5)


def write_first_layers(source: Path, folder: Path, layers: int, seed: int) -> None:
    """Write `with_layers` of the model in `source` as a model folder."""
    whole = load_model(source, torch.bfloat16, torch.device("cpu"))  # as it is saved; a large model fits more easily
    save_model(with_layers(whole, layers, seed), source, folder)


def with_layers(model: Model, layers: int, seed: int) -> Model:
    """The first `layers` layers of `model`; where it has fewer, new ones follow that add nothing until trained.

    What new layers write to the residual stream starts at zero, so a deeper model begins with the same logits.
    """
    c, kept = replace(model.config, layers=layers), model.layers[:layers]
    g = torch.Generator(model.embedding.device).manual_seed(seed)
    fresh = [_random_layer(c, g, model.dtype) for _ in range(layers - len(kept))]
    for layer in fresh:
        layer.out.zero_()
        layer.down.zero_()
        for name in ("qkv_bias", "out_bias", "gate_up_bias", "down_bias", "qk_norm"):
            like = getattr(kept[-1], name)
            if like is not None:
                setattr(layer, name, torch.ones_like(like) if name == "qk_norm" else torch.zeros_like(like))
    return Model(c, model.embedding, kept + fresh, model.norm, model.head)
