"""How long training will take on this machine: operations of a step over the speed of a short trial."""

from __future__ import annotations

import time

import torch

from bdcli.config.pretrain import Shape
from bdcli.model.build import random_model
from bdcli.model.config import ModelConfig, RopeConfig
from bdcli.train.held_out import next_token_rows
from bdcli.train.losses import head_loss
from bdcli.train.targets import ArgmaxTarget

TRIAL_TOKENS = 512
BACKWARD = 3  # operations of forward and backward, in forwards


def parameters(shape: Shape | ModelConfig) -> int:
    """Parameters that each token meets, the head among them; biases and norms left out."""
    c = shape
    heads = 2 * (c.heads + c.kv_heads) * c.head_dim
    return c.hidden_size * (c.vocab_size + c.layers * (heads + 3 * c.intermediate_size))


def forward_operations(shape: Shape | ModelConfig, tokens: int, keys: float) -> float:
    """Multiplications and additions of a forward over `tokens` that see `keys` others in the mean."""
    attention = 4 * shape.layers * shape.heads * shape.head_dim * keys
    return tokens * (2 * parameters(shape) + attention)


def speed(shape: Shape | ModelConfig, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of forward and backward through one random layer of this shape, and its head."""
    c = shape
    config = ModelConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        layers=1,
        heads=c.heads,
        kv_heads=c.kv_heads,
        head_dim=c.head_dim,
        max_position=TRIAL_TOKENS,
        norm_eps=1e-5,
        rope=RopeConfig("default", 10000.0, c.head_dim, TRIAL_TOKENS),
        tied_head=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_window=None,
    )
    model = random_model(config, 0, device=device)
    for tensor in model.tensors():
        tensor.requires_grad_()
    windows = torch.arange(TRIAL_TOKENS, device=device)[None] % c.vocab_size
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        x, following = next_token_rows(model, windows, dtype)
        head_loss(x, model.head, ArgmaxTarget(following), "ce")[0].backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    return BACKWARD * forward_operations(config, TRIAL_TOKENS, TRIAL_TOKENS / 2) / seconds


def duration(seconds: float) -> str:
    """For people."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
