"""How large a model is, from its configuration alone: weights, and numbers in KV entries."""

from __future__ import annotations

from bdcli.model.config import ModelConfig

NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def weight_count(c: ModelConfig) -> int:
    """Numbers in a model's weights."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    matrices = (q + 2 * kv) * c.hidden_size + c.hidden_size * q + 3 * c.hidden_size * c.intermediate_size
    biases = c.qkv_bias * (q + 2 * kv) + c.out_bias * c.hidden_size
    biases += c.mlp_bias * (2 * c.intermediate_size + c.hidden_size)
    layer = matrices + biases + 2 * c.hidden_size + c.qk_norm * (q + kv)
    return c.layers * layer + (1 if c.tied_head else 2) * c.vocab_size * c.hidden_size + c.hidden_size


def weight_bytes(c: ModelConfig, kind: str) -> int:
    """Bytes of a model's weights, kept as `kind`: the name of a dtype."""
    return NUMBER_BYTES[kind] * weight_count(c)


def kv_count(c: ModelConfig, entries: int) -> int:
    """Numbers in the keys and values of `entries` per layer and KV head."""
    return 2 * c.layers * c.kv_heads * c.head_dim * entries
