"""How large a model is, from its configuration alone: weights, and numbers in KV entries."""

from __future__ import annotations

from bdcli.model.config import ModelConfig

NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BLOCK_BYTES = {"int8": 34 / 32, "int4": 20 / 32}  # of a number: codes, and the scales and offsets of its block


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


def weight_bytes(c: ModelConfig, kind: str, dtype: str = "bfloat16") -> int:
    """Bytes of a model's weights, kept as `kind`: a dtype, int8 or int4, or auto for `dtype`.

    Of int8 and int4, embedding and head are int8.
    """
    if kind not in BLOCK_BYTES:
        return NUMBER_BYTES[kind if kind in NUMBER_BYTES else dtype] * weight_count(c)
    layers = layer_count(c)
    return round(BLOCK_BYTES[kind] * layers + BLOCK_BYTES["int8"] * (weight_count(c) - layers))


def draft_weight_bytes(c: ModelConfig, kind: str) -> int:
    """Bytes that a model's copy in fewer bits adds to it, as its own drafter: layers, and the head in int8."""
    return round(BLOCK_BYTES[kind] * layer_count(c) + BLOCK_BYTES["int8"] * c.vocab_size * c.hidden_size)


def layer_count(c: ModelConfig) -> int:
    """Numbers in the weights of all layers."""
    return weight_count(c) - (1 if c.tied_head else 2) * c.vocab_size * c.hidden_size - c.hidden_size


def kv_count(c: ModelConfig, entries: int) -> int:
    """Numbers in the keys and values of `entries` per layer and KV head."""
    return 2 * c.layers * c.kv_heads * c.head_dim * entries
