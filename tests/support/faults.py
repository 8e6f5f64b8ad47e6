"""Broken models and stores, each as the options of `bdcli decode` that name it."""

from __future__ import annotations

import json
import shutil

from safetensors.torch import load_file, save_file

from bdcli.model.hub import POCKET
from bdcli.results.store import Store


def pocket_copy(tmp_path, role="drafter"):
    folder = tmp_path / f"broken-{role}"
    shutil.copytree(POCKET / role, folder)
    return folder


def truncated(tmp_path):
    folder = pocket_copy(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    return ["--drafter", folder]


def without_tokenizer(tmp_path):
    folder = pocket_copy(tmp_path, "target")
    (folder / "tokenizer.json").unlink()
    return ["--target", folder]


def other_vocabulary(tmp_path):
    folder = pocket_copy(tmp_path)
    raw = json.loads((folder / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    a, b = list(vocab)[1000], list(vocab)[1001]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return ["--drafter", folder]


def unknown_architecture(tmp_path):
    folder = pocket_copy(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    return ["--drafter", folder]


def nan_weights(tmp_path):
    folder = pocket_copy(tmp_path, "target")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return ["--target", folder]


def read_only_store(tmp_path):
    Store(str(tmp_path / "ro.db"))
    (tmp_path / "ro.db").chmod(0o444)
    return ["--db", tmp_path / "ro.db"]


def text_as_store(tmp_path):
    (tmp_path / "text.db").write_text("hello, I am a text file\n" * 40)
    return ["--db", tmp_path / "text.db"]
