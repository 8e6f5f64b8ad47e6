"""A model in a GGUF file: its metadata as a config.json, its tensors under their Hugging Face names.

What the keys mean: llama.cpp's `llama-model.cpp` and its converters. Weights mean what `gguf.dequantize` makes of them.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor

from bdcli.base.digests import file_digest
from bdcli.base.errors import UserError
from bdcli.base.files import digest
from bdcli.model.gguf.blocks import ENCODINGS
from bdcli.model.gguf.file import GgufFile, StoredTensor, open_gguf, parts
from bdcli.model.gguf.tokenizer import build_tokenizer, end_tokens, special_ids
from bdcli.model.quantised import Weight

ARCHITECTURES = {"llama": "Llama 2/3, Mistral", "qwen2": "Qwen2/2.5", "qwen3": "Qwen3"}
ROPE_FACTORS = "rope_freqs.weight"  # a divisor for each frequency
_NAMES = (
    (r"model\.embed_tokens\.(\w+)", r"token_embd.\1"),
    (r"model\.norm\.(\w+)", r"output_norm.\1"),
    (r"lm_head\.(\w+)", r"output.\1"),
    (r"model\.layers\.(\d+)\.self_attn\.o_proj\.(\w+)", r"blk.\1.attn_output.\2"),
    (r"model\.layers\.(\d+)\.self_attn\.([qk]_norm|[qkv](?=_proj))(?:_proj)?\.(\w+)", r"blk.\1.attn_\2.\3"),
    (r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.(\w+)", r"blk.\1.ffn_\2.\3"),
    (r"model\.layers\.(\d+)\.input_layernorm\.(\w+)", r"blk.\1.attn_norm.\2"),
    (r"model\.layers\.(\d+)\.post_attention_layernorm\.(\w+)", r"blk.\1.ffn_norm.\2"),
)
# What changes the model where it says anything but 0, and is not computed here.
_NOT_COMPUTED = (
    "expert_count", "attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias", "attention.layer_indices",
    "attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "embedding_scale", "residual_scale",
    "use_parallel_residual", "rope.dimension_sections", "rope.scaling.alpha", "pooling_type",
)  # fmt: skip
_FOLDER_INSTEAD = "Use the model's Hugging Face folder"
_REQUANTISE = "Requantise it with llama-quantize to Q4_K_M, or use the Hugging Face folder"
_REQUIRED = object()


class Gguf:
    """See `bdcli.model.source.Source`."""

    def __init__(self, path: Path):
        self.path = path
        self._file = open_gguf(path)

    def config(self) -> dict:
        return config_of(self._file)

    def eos(self) -> frozenset[int]:
        return end_tokens(self._file)

    def weights(self, dtype: torch.dtype, device: torch.device, keep_codes: bool) -> GgufWeights:
        return GgufWeights(self._file, dtype, device, keep_codes)

    def codes(self, number_bytes: int) -> tuple[int, int] | None:
        layer = _tensor(self._file, stored_name("model.layers.0.mlp.gate_proj.weight")).encoding.form
        if layer is None:
            return None
        forms = ((math.prod(t.shape), t.encoding.form) for t in self._file.tensors.values())
        size = sum(count * (form.weight_bytes if form else number_bytes) for count, form in forms)
        return round(size), layer.bits

    def tokenizer(self):
        return build_tokenizer(self._file)

    def fingerprint(self) -> str:
        """Of the contents alone, since these files are renamed."""
        return digest([file_digest(file) for file in parts(self._file.path)])

    def write_tokenizer(self, folder: Path) -> None:
        self.tokenizer().save_pretrained(folder)

    def write_files(self, folder: Path) -> None:
        self.write_tokenizer(folder)
        special = {"bos_token_id": special_ids(self._file)["bos"], "eos_token_id": sorted(self.eos())}
        for name, content in (("config.json", self.config()), ("generation_config.json", special)):
            (folder / name).write_text(json.dumps(content, indent=2), "utf-8")


def config_of(file: GgufFile) -> dict:
    """The config.json of a file. Raises UserError on what this model cannot honour."""
    architecture = file.get("general.architecture", str, "?")
    if architecture not in ARCHITECTURES:
        known = ", ".join(f"{name} ({family})" for name, family in ARCHITECTURES.items())
        raise UserError(f"{file.path}: architecture {architecture} is not supported", f"Supported: {known}")
    keys = _Keys(file, architecture)
    _check(file, keys)
    heads, hidden = keys.count("attention.head_count"), keys.count("embedding_length")
    head_dim = keys.count("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.count(key, head_dim) != head_dim:
            raise keys.refused(key, f"the head dimension is {head_dim}")
    biased = _has(file, "blk.0.attn_q.bias"), _has(file, "blk.0.attn_output.bias")
    window = keys.count("attention.sliding_window", 0)
    return {
        **_family(architecture, biased == (True, False), window),
        "vocab_size": _tensor(file, "token_embd.weight").shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(file, keys, head_dim),
        "tie_word_embeddings": not _has(file, "output.weight"),
        "attention_bias": all(biased),
        "mlp_bias": _has(file, "blk.0.ffn_down.bias"),
        "bos_token_id": special_ids(file)["bos"],
        "eos_token_id": sorted(end_tokens(file)),
        "dtype": "bfloat16",
    }


def _family(architecture: str, only_qkv_biased: bool, window: int) -> dict:
    """What `transformers` calls a model with these parts; qwen2 is a Llama with biases on queries, keys and values."""
    if architecture == "qwen3" or only_qkv_biased:
        name = "qwen3" if architecture == "qwen3" else "qwen2"
        sliding = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0} if window else {}
        return {"architectures": [f"{name.title()}ForCausalLM"], "model_type": name, **sliding}
    name = "mistral" if window else "llama"
    sliding = {"sliding_window": window} if window else {}
    return {"architectures": [f"{name.title()}ForCausalLM"], "model_type": name, **sliding}


def _check(file: GgufFile, keys: _Keys) -> None:
    """Raise UserError naming the first thing in the file that is not computed here."""
    for key in _NOT_COMPUTED:
        value = keys.get(key, 0)
        if any(value) if isinstance(value, list) else value:
            raise keys.refused(key, _FOLDER_INSTEAD.lower())
    if keys.get("attention.causal", True) is not True:
        raise keys.refused("attention.causal", "a model that generates text is causal")
    for tensor in file.tensors.values():
        if tensor.kind not in ENCODINGS:
            raise UserError(f"{file.path}: tensor {tensor.name} is {tensor.kind_name}, not supported", _REQUANTISE)


def _rope(file: GgufFile, keys: _Keys, head_dim: int) -> dict:
    """`rope_parameters` of a config.json."""
    scaled = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", 10000.0)}
    kind = keys.get("rope.scaling.type", "linear")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    if _has(file, ROPE_FACTORS):
        if factor != 1.0 and kind != "none":
            raise keys.refused("rope.scaling.factor", f"the file has {ROPE_FACTORS} too")
        tensor = _tensor(file, ROPE_FACTORS)
        divisors = tensor.encoding.numbers(tensor.read(), torch.float32).flatten().tolist()
        if len(divisors) != head_dim // 2 or not all(0 < d < math.inf for d in divisors):
            raise UserError(f"{file.path}: {ROPE_FACTORS} is not {head_dim // 2} positive numbers", _FOLDER_INSTEAD)
        scaled |= {"rope_type": "longrope", "short_factor": divisors, "long_factor": divisors, "factor": 1.0}
        return scaled | {
            "attention_factor": attention, "original_max_position_embeddings": keys.count("context_length")
        }  # fmt: skip
    if kind == "yarn":
        return scaled | _yarn(keys, factor, attention)
    if kind not in ("none", "linear"):
        raise keys.refused("rope.scaling.type", "supported: none, linear, yarn")
    if attention != 1.0:
        raise keys.refused("rope.scaling.attn_factor", "only yarn has one")
    return scaled | ({"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1.0 else {})


def _yarn(keys: _Keys, factor: float, attention: float) -> dict:
    if keys.number("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise keys.refused("rope.scaling.yarn_ext_factor", "only 1 is supported")
    log_multiplier = keys.number("rope.scaling.yarn_log_multiplier", 0.0)
    total = keys.number("rope.scaling.yarn_attn_factor", 0.0)
    if not total:
        total = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
        if log_multiplier and factor > 1:
            total /= 1 + 0.1 * log_multiplier * math.log(factor)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.count(
            "rope.scaling.original_context_length", keys.count("context_length")
        ),
        "attention_factor": total * attention,
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
    }


class _Keys:
    """Metadata of the file's architecture, checked as it is read."""

    def __init__(self, file: GgufFile, architecture: str):
        self._file, self._prefix = file, architecture + "."

    def get(self, key: str, default: object = _REQUIRED) -> object:
        """A value; of a list, one for each layer, the one that all have."""
        value = self._file.metadata.get(self._prefix + key, default)
        if value is _REQUIRED:
            raise UserError(f"{self._file.path} lacks {self._prefix}{key}", "Convert the model again")
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            return value[0]
        return value

    def count(self, key: str, default: int | object = _REQUIRED) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or value < 0 or (value == 0 and default != 0):
            raise self.refused(key, "a positive number, equal in all layers, is supported")
        return value

    def number(self, key: str, default: float | object = _REQUIRED) -> float:
        value = self.get(key, default)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refused(key, "a number is supported")
        return float(value)

    def refused(self, key: str, why: str) -> UserError:
        value = str(self._file.metadata.get(self._prefix + key))
        return UserError(f"{self._file.path}: {self._prefix}{key} is {value[:60]}; {why}", _FOLDER_INSTEAD)


def _has(file: GgufFile, name: str) -> bool:
    return name in file.tensors


def _tensor(file: GgufFile, name: str) -> StoredTensor:
    if name not in file.tensors:
        raise UserError(f"{file.path}: tensor {name} is missing", "Download it again, or convert the model again")
    return file.tensors[name]


class GgufWeights:
    """Tensors of a file; see `bdcli.model.source.Weights`. Heads of llama files come in the order of `transformers`."""

    def __init__(self, file: GgufFile, dtype: torch.dtype, device: torch.device, keep_codes: bool):
        self._file, self.dtype, self._device, self._keep_codes = file, dtype, device, keep_codes
        config = config_of(file)
        permuted = file.metadata["general.architecture"] == "llama"
        heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
        self._permuted_heads = heads if permuted else {}
        self._open = set(file.tensors) - {ROPE_FACTORS}

    def take(self, name: str, shape: tuple[int, ...]) -> Weight:
        tensor = self._find(name, shape)
        stored, encoding, order = tensor.read(), tensor.encoding, self._row_order(name, shape[0])
        if len(shape) == 1:
            whole = encoding.numbers(stored, self.dtype)[0]
            return (whole if order is None else whole[order]).to(self._device)
        if order is not None:
            stored = stored[order]
        if self._keep_codes and encoding.decode is not None and self._device.type == "cpu":
            return encoding.blocks(stored).packed()
        return encoding.numbers(stored, self.dtype).to(self._device)

    def _find(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """Where a tensor is that has not been taken yet."""
        tensor = _tensor(self._file, stored_name(name))
        self._open.discard(tensor.name)
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.path}: {tensor.name} has shape {tensor.shape}, the metadata says {shape}", _FOLDER_INSTEAD
            )
        return tensor

    def _row_order(self, name: str, rows: int) -> Tensor | None:
        """Stored rows in the order of `transformers`, or None where they are in it.

        llama.cpp rotates neighbours, so in each head it has dimension i at row 2i and dimension i + D/2 at 2i + 1.
        """
        found = re.search(r"self_attn\.([qk])_proj\.", name)
        if found is None or not self._permuted_heads:
            return None
        return torch.arange(rows).view(self._permuted_heads[found[1]], -1, 2).transpose(1, 2).flatten()

    def __contains__(self, name: str) -> bool:
        return _has(self._file, stored_name(name))

    def expect_empty(self) -> None:
        left = sorted(self._open)
        if left:
            raise UserError(
                f"{self._file.path}: {len(left)} tensors have no place in this model, first {left[0]}", _FOLDER_INSTEAD
            )


def stored_name(name: str) -> str:
    """What GGUF calls a tensor of a Hugging Face checkpoint."""
    for pattern, replacement in _NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    raise ValueError(name)
