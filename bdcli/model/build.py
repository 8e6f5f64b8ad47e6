"""A model from random weights, or one of another depth: first weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bdcli.model.checkpoint import load_model, save_model
from bdcli.model.config import ModelConfig
from bdcli.model.llama import Layer, Model


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
