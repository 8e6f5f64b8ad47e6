"""Read a Hugging Face `config.json` into the few numbers a Llama-family decoder is made of.

Every key means what `transformers` 5 takes it to mean, a key left out the default of its class; what the decoder cannot
honour is refused by name.
"""

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
SCALED = ("linear", "dynamic", "yarn")  # RoPE types whose factor lengthens the context; of llama3 the length is final
_MODEL_TYPES = {name.removesuffix("ForCausalLM").lower(): name for name in SUPPORTED}
_EVERY = {
    "num_key_value_heads": None,  # as many as heads
    "head_dim": None,  # hidden_size / heads
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "attention_chunk_size": None,
    "layer_types": None,
}
_MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
CLASS_DEFAULTS = {  # of keys that config.json may leave out
    "LlamaForCausalLM": _EVERY | {"max_position_embeddings": 2048},
    "MistralForCausalLM": _EVERY | _MISTRAL,
    "Qwen2ForCausalLM": _EVERY | _QWEN,
    "Qwen3ForCausalLM": _EVERY | _QWEN | {"head_dim": 128},
}
_ACTIVATIONS = ("silu", "swish")  # two names of one function
_LAYER_TYPES = ("full_attention", "sliding_attention")
_LARGEST = 1e18
_AGAIN = "Correct it, or download the model folder again"


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

    @property
    def context_limit(self) -> int:
        """Most tokens of a text, prompt and new ones together.

        `max_position`, factor × original where RoPE is scaled; the sliding window where there is one, which is not
        decoded beyond its size.
        """
        limit = self.max_position
        if self.rope.kind in SCALED:
            limit = max(limit, int(self.rope.factor * (self.rope.original_max_position or limit)))
        return min(limit, self.sliding_window or limit)


class _Keys:
    """Values of a parsed config.json by key, each of the type that is asked for; UserErrors name the key."""

    def __init__(self, raw: dict, defaults: dict, where: str):
        self.raw, self.where = raw, where
        self._defaults = defaults

    def value(self, key: str) -> object:
        if key not in self.raw and key not in self._defaults:
            raise UserError(f"{self.where}: config.json lacks {key!r}", "Download the model folder again")
        return self.raw.get(key, self._defaults.get(key))

    def refuse(self, key: str, wanted: str) -> UserError:
        return UserError(f"{self.where}: config.json has {key} = {self.value(key)!r}, not {wanted}", _AGAIN)

    def whole(self, key: str, least: int = 1) -> int:
        found = self.value(key)
        if type(found) is not int or found < least:
            raise self.refuse(key, f"a whole number from {least}")
        return found

    def whole_or_none(self, key: str) -> int | None:
        return None if self.value(key) is None else self.whole(key)

    def number(self, key: str) -> float:
        """Above 0."""
        found = self.value(key)
        if type(found) not in (int, float) or not 0 < found <= _LARGEST:
            raise self.refuse(key, f"a number above 0, {_LARGEST:.0e} at most")
        return found

    def number_or_none(self, key: str) -> float | None:
        return None if self.value(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        found = self.value(key)
        if type(found) is not bool:
            raise self.refuse(key, "true or false")
        return found


def parse_config(raw: dict, where: str) -> ModelConfig:
    """`raw` is the parsed config.json of folder `where`. Raises UserError on anything the model cannot honour."""
    _refuse_quantised(raw, where)
    architecture = architecture_of(raw, where)
    keys = _Keys(raw, CLASS_DEFAULTS[architecture], where)
    heads, hidden = keys.whole("num_attention_heads"), keys.whole("hidden_size")
    qwen2, qwen3 = architecture == "Qwen2ForCausalLM", architecture == "Qwen3ForCausalLM"
    head_dim = keys.whole("head_dim") if qwen3 else keys.whole_or_none("head_dim") or hidden // heads
    llama = architecture == "LlamaForCausalLM"
    biased = (llama or qwen3) and keys.flag("attention_bias")
    config = ModelConfig(
        vocab_size=keys.whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.whole("intermediate_size"),
        layers=keys.whole("num_hidden_layers"),
        heads=heads,
        kv_heads=keys.whole_or_none("num_key_value_heads") or heads,
        head_dim=head_dim,
        max_position=keys.whole("max_position_embeddings"),
        norm_eps=keys.number("rms_norm_eps"),
        rope=_parse_rope(keys, head_dim),
        tied_head=keys.flag("tie_word_embeddings"),
        qkv_bias=qwen2 or biased,
        out_bias=biased,
        mlp_bias=llama and keys.flag("mlp_bias"),
        qk_norm=qwen3,
        sliding_window=_sliding_window(keys, architecture),
    )
    if keys.value("hidden_act") not in _ACTIVATIONS:
        raise UserError(f"{where}: activation {raw['hidden_act']!r} is not supported", "Supported: silu")
    for key in ("per_layer_config", "transformers_weights"):  # layers of several shapes; weights in files of any name
        if raw.get(key):
            raise UserError(f"{where}: config.json has {key}, which is not supported", "Use a model without it")
    if config.heads % config.kv_heads or config.head_dim % 2 or not config.head_dim:
        raise UserError(
            f"{where}: {config.heads} heads over {config.kv_heads} KV heads of dimension {config.head_dim} do not fit",
            "Check num_attention_heads, num_key_value_heads and head_dim in config.json",
        )
    return config


def architecture_of(raw: dict, where: str) -> str:
    """The class in SUPPORTED that `transformers` makes of a config.json: `model_type` decides where it is given.

    A base model (`LlamaModel`) is its class with a head. Raises UserError on every other class.
    """
    names = raw.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: config.json has architectures = {names!r}, not a list of names", _AGAIN)
    given, kind = names[0] if names else None, raw.get("model_type")
    if "draft_vocab_size" in raw or "eagle" in f"{given} {kind}".lower():
        raise eagle_head(where)
    named = f"{given[: -len('Model')]}ForCausalLM" if given and given.endswith("Model") else given
    typed = _MODEL_TYPES.get(kind) if isinstance(kind, str) else None
    found = named or typed
    if found not in SUPPORTED:
        known = ", ".join(f"{name} ({family})" for name, family in SUPPORTED.items())
        hint = f"Supported: {known}; as a target, any other causal model decodes with --engine transformers"
        raise UserError(f"{where}: architecture {given or kind or '?'} is not supported", hint)
    if kind is not None and typed != found:
        raise UserError(f"{where}: config.json says architecture {given}, but model_type {kind!r}", _AGAIN)
    return found


def eagle_head(where: str) -> UserError:
    """What is said of a draft head that reads the target's hidden states."""
    return UserError(
        f"{where} is an EAGLE draft head: it reads its target's hidden states and is no model of its own",
        "Use a small model of the same tokenizer as drafter, or --drafter self",
    )


def quantised(where: str, method: str) -> UserError:
    """What is said of weights in fewer bits."""
    return UserError(
        f"{where}: the weights are quantised ({method}), which is not read",
        "Use the model's folder with bfloat16 or float16 weights",
    )


def _refuse_quantised(raw: dict, where: str) -> None:
    for key in ("quantization_config", "compression_config", "quantization"):  # the last is MLX's
        settings = raw.get(key)
        if not settings:
            continue
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        if method is None:
            loads = isinstance(settings, dict) and ("load_in_4bit" in settings or "load_in_8bit" in settings)
            method = "bitsandbytes" if loads else "MLX" if key == "quantization" else key
        raise quantised(where, str(method))


def _sliding_window(keys: _Keys, architecture: str) -> int | None:
    """Keys that a query of the layers that slide can see; None where no layer does."""
    window, layers = keys.whole_or_none("sliding_window"), keys.whole("num_hidden_layers")
    types = keys.value("layer_types")
    if types is not None and not _are_layer_types(types, layers):
        raise keys.refuse("layer_types", f"{layers} of {', '.join(_LAYER_TYPES)}")
    if not architecture.startswith("Qwen"):  # of a Llama, the caches of `transformers` slide
        return window or keys.whole_or_none("attention_chunk_size")
    window = window if keys.flag("use_sliding_window") else None
    if types is None:
        return window if keys.whole("max_window_layers", 0) < layers else None
    if "sliding_attention" in types and window is None:
        raise keys.refuse("layer_types", "without sliding_attention where no window is set")
    return window if "sliding_attention" in types else None


def _are_layer_types(types: object, layers: int) -> bool:
    return isinstance(types, list) and len(types) == layers and all(kind in _LAYER_TYPES for kind in types)


def _parse_rope(model: _Keys, head_dim: int) -> RopeConfig:
    """`rope_scaling` where it says anything, else `rope_parameters`, as `transformers` 5 reads them."""
    raw, where = model.raw, model.where
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    scaling = {} if raw.get(key) is None else raw[key]
    if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
        raise UserError(f"{where}: config.json has {key} = {scaling!r}, not one table of settings", _AGAIN)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UserError(f"{where}: RoPE type {kind!r} is not supported", f"Supported: {', '.join(ROPE_TYPES)}")
    top = {name: raw[name] for name in ("rope_theta", "partial_rotary_factor") if name in raw}
    max_position = model.whole("max_position_embeddings")
    defaults = {"rope_theta": 10000.0, "partial_rotary_factor": None} | top
    defaults |= dict.fromkeys(("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"))
    defaults |= {"original_max_position_embeddings": max_position, "truncate": True}
    if "original_max_position_embeddings" in raw:  # beats the inner one
        scaling = scaling | {"original_max_position_embeddings": raw["original_max_position_embeddings"]}
    if kind in ("yarn", "longrope"):
        defaults["factor"] = None
    keys = _Keys(scaling, defaults, where)
    partial = keys.value("partial_rotary_factor")
    if partial not in (None, 1.0):
        raise UserError(f"{where}: partial_rotary_factor {partial!r} is not supported", "Only 1.0 is")
    rope = {"kind": kind, "theta": keys.number("rope_theta"), "head_dim": head_dim, "max_position": max_position}
    if kind == "default":
        return RopeConfig(**rope)
    original = keys.whole("original_max_position_embeddings")
    factor = keys.number_or_none("factor") or max_position / original
    stated = kind in ("llama3", "yarn") or "original_max_position_embeddings" in scaling
    rope |= {"factor": factor, "original_max_position": original if stated else None}
    if kind == "llama3":
        low, high = keys.number("low_freq_factor"), keys.number("high_freq_factor")
        if high <= low:
            raise keys.refuse("high_freq_factor", f"above low_freq_factor = {low}")
        rope |= {"low_freq_factor": low, "high_freq_factor": high}
    if kind == "yarn":
        rope |= _parse_yarn(keys, factor)
    if kind == "longrope":
        rope |= _parse_longrope(keys, factor, original, head_dim) | {"original_max_position": original}
    return RopeConfig(**rope)


def _parse_longrope(keys: _Keys, factor: float, original: int, head_dim: int) -> dict[str, object]:
    """Fields of a longrope RopeConfig that other types have not."""
    found = {}
    for name in ("short", "long"):
        divisors = keys.value(f"{name}_factor")
        numbers = isinstance(divisors, list) and all(isinstance(d, int | float) and 0 < d < _LARGEST for d in divisors)
        if not numbers or len(divisors) != head_dim // 2:
            raise keys.refuse(f"{name}_factor", f"{head_dim // 2} positive numbers")
        found[f"{name}_factors"] = tuple(map(float, divisors))
    attention = keys.number_or_none("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return found | {"attention_factor": attention}


def _parse_yarn(keys: _Keys, factor: float) -> dict[str, float | bool]:
    """Fields of a YaRN RopeConfig that other types have not."""
    attention, scale, scale_all = map(keys.number_or_none, ("attention_factor", "mscale", "mscale_all_dim"))
    if attention is None and scale and scale_all:
        attention = _mscale(factor, scale) / _mscale(factor, scale_all)
    return {
        "beta_fast": keys.number_or_none("beta_fast") or 32.0,
        "beta_slow": keys.number_or_none("beta_slow") or 1.0,
        "attention_factor": attention,
        "truncate": keys.flag("truncate"),
    }


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
