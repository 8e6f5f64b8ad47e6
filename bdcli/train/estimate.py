"""How long training will take on this machine: operations of a step over the speed of a short trial."""

from __future__ import annotations

import time

import torch

from bdcli.config.pretrain import Shape
from bdcli.model.build import random_model
from bdcli.model.config import ModelConfig, RopeConfig
from bdcli.train.held_out import next_token_rows
from bdcli.train.losses import ArgmaxTarget, head_loss

TRIAL = 512  # tokens
BACKWARD = 3  # operations of forward and backward, in forwards


def weights(shape: Shape | ModelConfig) -> int:
    """Parameters that each token meets, the head among them; biases and norms left out."""
    c = shape
    heads = 2 * (c.heads + c.kv_heads) * _head_dim(c)
    return c.hidden_size * (c.vocab_size + c.layers * (heads + 3 * c.intermediate_size))


def forward_operations(shape: Shape | ModelConfig, tokens: int, keys: float) -> float:
    """Multiplications and additions of a forward over `tokens` that see `keys` others in the mean."""
    attention = 4 * shape.layers * shape.heads * _head_dim(shape) * keys
    return tokens * (2 * weights(shape) + attention)


def speed(shape: Shape | ModelConfig, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of forward and backward through one random layer of this shape, and its head."""
    dim, c = _head_dim(shape), shape
    rope = RopeConfig("default", 10000.0, dim, TRIAL)
    config = ModelConfig(
        c.vocab_size, c.hidden_size, c.intermediate_size, 1, c.heads, c.kv_heads, dim, TRIAL, 1e-5, rope, True, False,
        False, False, False, None,
    )  # fmt: skip
    model = random_model(config, 0, device=device)
    for tensor in model.tensors():
        tensor.requires_grad_()
    windows = torch.arange(TRIAL, device=device)[None] % c.vocab_size
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        x, following = next_token_rows(model, windows, dtype)
        head_loss(x, model.head, ArgmaxTarget(following), "ce")[0].backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = time.perf_counter() - began
    return BACKWARD * forward_operations(config, TRIAL, TRIAL / 2) / taken


def duration(seconds: float) -> str:
    """For people."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _head_dim(shape: Shape | ModelConfig) -> int:
    return getattr(shape, "head_dim", shape.hidden_size // shape.heads)
