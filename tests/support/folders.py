"""Small model folders, and what `transformers` makes of them in fp32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from bdcli.cache.full import FullCache
from bdcli.model.checkpoint import load_model
from bdcli.model.hub import POCKET

CPU = torch.device("cpu")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
EXTRA = {"id": 4096, "content": "<extra>", "single_word": False, "lstrip": False, "rstrip": False}
EXTRA |= {"normalized": False, "special": True}
APPENDS_EOS = {  # a post-processor that puts </s> after every text
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
}


def edit(path: Path, **changes: object) -> Path:
    """Change keys of a JSON file; `...` drops one."""
    values = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}), "utf-8")
    return path


def pocket_copy(role: str, out: Path, **config: object) -> Path:
    """The pocket target or drafter with another configuration."""
    shutil.copytree(POCKET / role, out)
    edit(out / "config.json", **config)
    return out


def random_folder(family: str, out: Path, **config: object) -> Path:
    """Random weights of a family with the pocket tokenizer, spread so that texts depend on all of the prompt."""
    settings = {
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}Config")(**(settings | config))
    getattr(transformers, f"{family}ForCausalLM")(made).save_pretrained(out)
    for name in TOKENIZER_FILES:
        shutil.copy(POCKET / "target" / name, out)
    return out


def add_token(folder: Path, special: bool = True) -> None:
    """Give a pocket tokenizer a token that the model has no embedding of."""
    tokenizer = folder / "tokenizer.json"
    known = json.loads(tokenizer.read_text("utf-8"))["added_tokens"]
    edit(tokenizer, added_tokens=[*known, EXTRA | {"special": special}])


def pad_vocabulary(folder: Path, rows: int) -> Path:
    """Give an embedding more rows, as checkpoints padded to round sizes have."""
    edit(folder / "config.json", vocab_size=rows)
    weights = load_file(folder / "model.safetensors")
    old = weights["model.embed_tokens.weight"]
    added = torch.zeros(rows - len(old), old.shape[1], dtype=old.dtype)
    weights["model.embed_tokens.weight"] = torch.cat((old, added))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def random_ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(2, 4096, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def reference_model(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def reference_text(folder: Path, ids: list[int], tokens: int) -> list[int]:
    """Greedy text of `transformers` after a prompt."""
    found = reference_model(folder).generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
    return found[0, len(ids) :].tolist()


@torch.no_grad()
def logit_error(folder: Path, ids: list[int]) -> float:
    """Largest difference between our last logits and those of `transformers`, over the size of theirs."""
    want = reference_model(folder)(torch.tensor([ids])).logits[0, -1]
    model = load_model(folder, torch.float32, CPU)
    cache = FullCache(model, len(ids) + 1, len(ids))
    model.prefill(ids[:-1], cache)
    got = model.forward(ids[-1:], cache, 1)[0]
    return float((got - want).abs().max() / want.abs().max())
