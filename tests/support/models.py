"""Tiny random models."""

from __future__ import annotations

import torch

from bdcli.model.config import ModelConfig, RopeConfig
from bdcli.model.llama import Layer, Model


def tiny_model(
    layers=2,
    heads=4,
    kv_heads=2,
    dim=8,
    vocab=41,
    seed=0,
    dtype=torch.float32,
    spread=0.35,
    hidden=24,
    inner=40,
    biases=False,
    qk_norm=False,
) -> Model:
    """Random weights, large enough that attention is far from uniform."""
    g = torch.Generator().manual_seed(seed)

    def weight(*shape):
        return (torch.randn(*shape, generator=g) * spread).to(dtype)

    def norm():
        return (1 + 0.1 * torch.randn(hidden, generator=g)).to(dtype)

    rope = RopeConfig("default", 10000.0, dim, 4096)
    config = ModelConfig(
        vocab,
        hidden,
        inner,
        layers,
        heads,
        kv_heads,
        dim,
        4096,
        1e-5,
        rope,
        False,
        biases,
        biases,
        biases,
        qk_norm,
        None,
    )
    blocks = [
        Layer(
            norm(),
            weight((heads + 2 * kv_heads) * dim, hidden),
            weight(hidden, heads * dim),
            norm(),
            weight(2 * inner, hidden),
            weight(hidden, inner),
        )
        for _ in range(layers)
    ]
    for block in blocks:
        if biases:
            for name in ("qkv", "out", "gate_up", "down"):
                setattr(block, name + "_bias", weight(getattr(block, name).shape[0]))
        if qk_norm:
            block.qk_norm = 1 + weight(heads + kv_heads, dim)
    return Model(config, weight(vocab, hidden), blocks, norm(), weight(vocab, hidden))


def library_model(family: str, settings: dict):
    """A random model of `transformers`. Biases start at 0 and norms at 1, which would hide their absence."""
    import transformers

    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.3)
            elif "norm" in name:
                weight.normal_(1, 0.2)
    return model
