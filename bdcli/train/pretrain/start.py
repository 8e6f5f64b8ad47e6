"""What a model from random weights starts with: a byte-level BPE tokenizer and a configuration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from bdcli.config.pretrain import Shape
from bdcli.model.config import ModelConfig, parse_config

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
