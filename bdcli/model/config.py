"""Read a Hugging Face `config.json` into the few numbers a Llama-family decoder is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bdcli.base.errors import UserError

SUPPORTED = {
    "LlamaForCausalLM": "Llama 2/3",
    "MistralForCausalLM": "Mistral",
    "Qwen2ForCausalLM": "Qwen2/2.5",
    "Qwen3ForCausalLM": "Qwen3",
}
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_ROPE_KEYS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding settings; fields of other types than `kind` are None."""

    kind: str
    theta: float
    head_dim: int
    max_position: int
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    short_factors: tuple[float, ...] = ()  # longrope: divisors of the frequencies, [D/2] each
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    rope: RopeConfig
    tied_head: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None


def parse_config(raw: dict, where: str) -> ModelConfig:
    """`raw` is the parsed config.json of folder `where`. Raises UserError on anything the model cannot honour."""
    architecture = (raw.get("architectures") or ["?"])[0]
    if architecture not in SUPPORTED:
        known = ", ".join(f"{name} ({family})" for name, family in SUPPORTED.items())
        raise UserError(f"{where}: architecture {architecture} is not supported", f"Supported: {known}")
    try:
        heads = raw["num_attention_heads"]
        hidden = raw["hidden_size"]
        head_dim = raw.get("head_dim") or hidden // heads
        qwen2 = architecture == "Qwen2ForCausalLM"
        config = ModelConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=hidden,
            intermediate_size=raw["intermediate_size"],
            layers=raw["num_hidden_layers"],
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            max_position=raw["max_position_embeddings"],
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope=_parse_rope(raw, head_dim, where),
            tied_head=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=qwen2 or bool(raw.get("attention_bias", False)),
            out_bias=not qwen2 and bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            qk_norm=architecture == "Qwen3ForCausalLM",
            sliding_window=_sliding_window(raw, architecture),
        )
    except KeyError as missing:
        raise UserError(f"{where}: config.json lacks {missing}", "Download the model folder again") from None
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: activation {raw['hidden_act']!r} is not supported", "Supported: silu")
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise UserError(
            f"{where}: {config.heads} heads over {config.kv_heads} KV heads of dimension {config.head_dim} do not fit",
            "Check num_attention_heads, num_key_value_heads and head_dim in config.json",
        )
    return config


def _sliding_window(raw: dict, architecture: str) -> int | None:
    if architecture.startswith("Qwen") and not raw.get("use_sliding_window", False):
        return None
    return raw.get("sliding_window") if architecture != "LlamaForCausalLM" else None


def _parse_rope(raw: dict, head_dim: int, where: str) -> RopeConfig:
    """Accepts `rope_parameters` (transformers 5) and `rope_scaling` + `rope_theta` (before)."""
    scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise UserError(f"{where}: RoPE type {kind!r} is not supported", f"Supported: {', '.join(ROPE_TYPES)}")
    partial = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UserError(f"{where}: partial_rotary_factor {partial} is not supported", "Only 1.0 is")
    max_position = raw["max_position_embeddings"]
    original = scaling.get("original_max_position_embeddings", raw.get("original_max_position_embeddings"))
    if kind in ("yarn", "longrope") and original is None:
        original = max_position
    for key in _ROPE_KEYS.get(kind, ()):
        scaling[key]  # a KeyError names what config.json lacks
    factor = scaling.get("factor")
    if factor is None:
        factor = max_position / original if kind in ("yarn", "longrope") else 1.0
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None and scaling.get("mscale") and scaling.get("mscale_all_dim"):
        attention_factor = _mscale(factor, scaling["mscale"]) / _mscale(factor, scaling["mscale_all_dim"])
    if kind == "longrope" and attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (tuple(scaling.get(f"{name}_factor") or ()) for name in ("short", "long"))
    if kind == "longrope" and not len(short) == len(long) == head_dim // 2:
        raise UserError(f"{where}: longrope has {len(short)} and {len(long)} factors, not {head_dim // 2} each")
    return RopeConfig(
        kind=kind,
        theta=scaling.get("rope_theta", raw.get("rope_theta", 10000.0)),
        head_dim=head_dim,
        max_position=max_position,
        factor=factor,
        original_max_position=original,
        low_freq_factor=scaling.get("low_freq_factor"),
        high_freq_factor=scaling.get("high_freq_factor"),
        beta_fast=scaling.get("beta_fast") or 32.0,
        beta_slow=scaling.get("beta_slow") or 1.0,
        attention_factor=attention_factor,
        truncate=scaling.get("truncate", True),
        short_factors=short,
        long_factors=long,
    )


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
