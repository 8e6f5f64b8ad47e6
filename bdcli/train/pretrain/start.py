"""The model that pretraining starts from: a given one, its first layers, or random weights with a new tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from bdcli.config.pretrain import PretrainRecipe, Shape
from bdcli.data.sources import documents
from bdcli.model.build import random_model, write_first_layers
from bdcli.model.checkpoint import save_model
from bdcli.model.config import ModelConfig, parse_config
from bdcli.model.hub import resolve
from bdcli.model.source import open_source
from bdcli.model.tokenizer import load_tokenizer

SPECIAL_TOKENS = ("<s>", "</s>")  # ids 0 and 1; the tokenizer adds neither by itself
TOKENIZER_CHARACTERS = 20_000_000  # of text that a tokenizer is trained on
_START, _UNWEIGHTED = "start", "start.like"  # folders of a model made here, and of its files without weights


def start_folder(recipe: PretrainRecipe, init: Path | None, out: Path) -> Path:
    """Folder of the model that training starts from: `init`, one of another depth, or one from random weights.

    The last two are made once, in `out`.
    """
    if init is not None and recipe.layers is None:
        return init
    folder = out / _START
    if folder.exists():
        return folder
    if init is not None:
        write_first_layers(init, folder, recipe.layers, recipe.seed)
        return folder
    unweighted = out / _UNWEIGHTED
    unweighted.mkdir(exist_ok=True)
    if recipe.tokenizer is not None:
        open_source(resolve(recipe.tokenizer, "target")).write_tokenizer(unweighted)
    else:
        write_tokenizer(unweighted, tokenizer_text(recipe.corpus.sources), recipe.shape.vocab_size)
    tokenizer = load_tokenizer(unweighted)
    config = write_config(unweighted, recipe.shape, len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    save_model(random_model(config, recipe.seed), unweighted, folder)
    return folder


def tokenizer_text(sources: tuple[str, ...]) -> Iterator[str]:
    """About TOKENIZER_CHARACTERS of training documents, the same amount of each source."""
    for source in sources:
        left = TOKENIZER_CHARACTERS // len(sources)
        for doc in documents(source):
            if doc.held_out:
                continue
            yield doc.text[:left]
            left -= len(doc.text)
            if left <= 0:
                break


def write_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int) -> None:
    """Train a byte-level BPE of `vocab_size` entries on `texts` and write it as `transformers` reads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos = SPECIAL_TOKENS
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), "utf-8")


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
        "head_dim": shape.head_dim,
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
