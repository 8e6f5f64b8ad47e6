"""Model folders: every fault is one UserError that names what is wrong; the pocket pair loads."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from bdcli.base.devices import pick_device, pick_dtype, training_dtype
from bdcli.base.errors import UserError
from bdcli.model.checkpoint import eos_tokens, load_model, read_config
from bdcli.model.config import ROPE_TYPES, SUPPORTED
from bdcli.model.hub import POCKET, resolve
from bdcli.model.tokenizer import check_vocabulary, load_tokenizer

CPU = torch.device("cpu")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """What a checkpoint with this CONFIG holds."""
    layer = {
        "input_layernorm": (24,),
        "self_attn.q_proj": (24, 24),
        "self_attn.k_proj": (12, 24),
        "self_attn.v_proj": (12, 24),
        "self_attn.o_proj": (24, 24),
        "post_attention_layernorm": (24,),
        "mlp.gate_proj": (40, 24),
        "mlp.up_proj": (40, 24),
        "mlp.down_proj": (24, 40),
    }
    every = {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    return every | {
        "model.embed_tokens.weight": (31, 24),
        "model.norm.weight": (24,),
        "lm_head.weight": (31, 24),
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    """A whole tiny model, to be damaged."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file({name: torch.randn(shape) for name, shape in shapes().items()}, tmp_path / WEIGHTS)
    return tmp_path


def configure(folder: Path, **changes) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def drop_key(folder: Path, key: str) -> None:
    (folder / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != key}))


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


def shard(folder: Path) -> None:
    """Split the weights in two files with an index."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, where = sorted(weights), {}
    for i, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))


def lose_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def config_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def empty_index(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text("{}")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncate_shard(folder: Path) -> None:
    shard(folder)
    truncate(folder / "model-00001-of-00002.safetensors")


def only_bin(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"
DAMAGES = {
    "architecture": (
        lambda f: configure(f, architectures=["GPT2LMHeadModel"]),
        ["GPT2LMHeadModel", *SUPPORTED],
    ),
    "no architecture": (lambda f: drop_key(f, "architectures"), ["not supported", *SUPPORTED]),
    "rope type": (lambda f: configure(f, rope_scaling={"type": "spiral"}), ["'spiral'", *ROPE_TYPES]),
    "rope factor": (lambda f: configure(f, rope_scaling={"type": "linear"}), ["lacks 'factor'"]),
    "llama3 band": (
        lambda f: configure(f, rope_parameters={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}),
        ["lacks 'high_freq_factor'"],
    ),
    "longrope factors": (
        lambda f: configure(f, rope_parameters={"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}),
        ["short_factor", "3 positive numbers"],
    ),
    "partial rotary": (lambda f: configure(f, partial_rotary_factor=0.5), ["partial_rotary_factor 0.5"]),
    "activation": (lambda f: configure(f, hidden_act="gelu"), ["'gelu'", "silu"]),
    "heads": (lambda f: configure(f, num_key_value_heads=3), ["4 heads over 3 KV heads"]),
    "config key": (lambda f: drop_key(f, "hidden_size"), ["config.json lacks 'hidden_size'"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json does not exist"]),
    "config a folder": (config_folder, ["config.json cannot be read"]),
    "config not JSON": (lambda f: truncate(f / "config.json"), ["config.json is not valid JSON"]),
    "config not an object": (
        lambda f: (f / "config.json").write_text("[]"),
        ["config.json is not a JSON object"],
    ),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), ["is not valid JSON"]),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ["holds no model.safetensors"]),
    "only bin": (only_bin, ["only .bin", "safetensors"]),
    "truncated": (lambda f: truncate(f / WEIGHTS), [WEIGHTS, "damaged or truncated"]),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), [WEIGHTS, "damaged or truncated"]),
    "LFS pointer": (lambda f: (f / WEIGHTS).write_text(LFS_POINTER), [WEIGHTS, "damaged or truncated"]),
    "truncated shard": (truncate_shard, ["model-00001-of-00002.safetensors", "damaged or truncated"]),
    "missing shard": (lose_shard, ["model-00002-of-00002.safetensors is missing"]),
    "empty index": (empty_index, [INDEX, "lists no weights"]),
    "missing tensor": (lambda f: change_weights(f, lambda w: w.pop(K_PROJ)), [f"{K_PROJ} is missing"]),
    "no head": (
        lambda f: change_weights(f, lambda w: w.pop("lm_head.weight")),
        ["lm_head.weight is missing"],
    ),
    "shape": (
        lambda f: change_weights(f, lambda w: w.update({K_PROJ: torch.zeros(11, 24)})),
        [K_PROJ, "(11, 24)", "(12, 24)"],
    ),
    "more tensors": (
        lambda f: change_weights(f, lambda w: w.update({"model.extra": torch.zeros(1), "z": torch.zeros(1)})),
        ["2 tensors have no place", "model.extra"],
    ),
    "a bias the config denies": (
        lambda f: change_weights(f, lambda w: w.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(40)})),
        ["1 tensors have no place", "model.layers.0.mlp.up_proj.bias"],
    ),
}


def says(error: pytest.ExceptionInfo, *parts: str) -> None:
    assert not [part for part in parts if part not in str(error.value)], str(error.value)
    assert "\n" not in str(error.value) and error.value.exit_code == 2


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder(folder, name):
    damage, parts = DAMAGES[name]
    load_model(folder, torch.float32, CPU)  # whole before
    damage(folder)
    with pytest.raises(UserError) as error:
        load_model(folder, torch.float32, CPU)
    says(error, str(folder), *parts)


def test_tables_are_ignored(folder):
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(2)}
    change_weights(folder, lambda w: w.update(tables))
    assert load_model(folder, torch.float32, CPU).head.shape == (31, 24)


def test_shards_hold_the_same_weights(folder):
    whole = load_model(folder, torch.float32, CPU)
    shard(folder)
    for ours, theirs in zip(whole.tensors(), load_model(folder, torch.float32, CPU).tensors(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("role, layers, parameters", [("target", 12, 10_688_768), ("drafter", 2, 2_655_488)])
def test_the_pocket_pair(role, layers, parameters):
    folder = resolve("pocket", role)
    assert folder == POCKET / role
    model = load_model(folder, torch.float32, CPU)
    assert {t.dtype for t in model.tensors()} == {torch.float32} and model.dtype is torch.float32
    assert sum(t.numel() for t in model.tensors()) == parameters  # the tied head counts once
    assert model.weight_bytes == 4 * parameters
    assert len(model.layers) == layers and model.config == read_config(folder)
    assert load_model(folder, torch.bfloat16, CPU).weight_bytes == 2 * parameters
    assert len(load_tokenizer(folder)) == model.config.vocab_size == 4096


def test_a_folder_is_found(folder, monkeypatch):
    assert resolve(str(folder), "target") == folder
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve(f"~/{folder.name}", "drafter") == folder


@pytest.mark.parametrize(
    "name, parts",
    [
        ("{folder}/config.json", ["config.json is a file", "folder"]),
        ("{folder}/nowhere", ["nowhere: no such folder", "owner/model"]),
        ("./nowhere", ["no such folder"]),
        ("nowhere", ["no such folder", "pocket"]),
        ("some models/llama", ["some models/llama: neither a folder here nor a hub name"]),
        ("models/", ["models/: neither a folder here nor a hub name"]),
    ],
)
def test_no_such_model(folder, name, parts):
    with pytest.raises(UserError) as error:
        resolve(name.format(folder=folder), "drafter")
    says(error, "--drafter", *parts)


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """An empty hub cache without a network; a name look-up is a failure."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    return tmp_path / "hub"


@pytest.mark.usefixtures("offline")
def test_a_hub_name_offline():
    with pytest.raises(UserError) as error:
        resolve("owner/model", "target")
    says(error, "--target owner/model", "hf download owner/model")


def test_a_hub_name_in_the_cache_needs_no_network(offline):
    repository, commit = offline / "models--owner--model", "0123456789abcdef" * 2 + "01234567"
    snapshot = repository / "snapshots" / commit
    for path, text in (
        (repository / "refs" / "main", commit),
        (snapshot / "config.json", json.dumps(CONFIG)),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert resolve("owner/model", "target") == snapshot


@pytest.mark.parametrize("fault", [ConnectionError("refused"), RuntimeError("a proxy in between")])
def test_a_hub_that_does_not_answer(monkeypatch, fault):
    def fail(*_, **__):
        raise fault

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError) as error:
        resolve("owner/model", "drafter")
    says(error, "--drafter owner/model", type(fault).__name__, "hf download owner/model")


def test_a_folder_without_a_tokenizer(folder):
    with pytest.raises(UserError) as error:
        load_tokenizer(folder)
    says(error, str(folder), "holds no tokenizer", "tokenizer.json")


def test_a_broken_tokenizer(folder):
    shutil.copy(POCKET / "target" / "tokenizer.json", folder)
    truncate(folder / "tokenizer.json")
    with pytest.raises(UserError) as error:
        load_tokenizer(folder)
    says(error, str(folder), "the tokenizer cannot be read")


def swap_two(tokenizer: dict) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["ks"], vocabulary["irl"] = vocabulary["irl"], vocabulary["ks"]


def add_many(tokenizer: dict) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"] += [{"id": 4096 + i, "content": f"<extra_{i}>", **flags} for i in range(100)]


def drafter_with(folder: Path, change) -> Path:
    """`folder` as the pocket drafter after `change` to its tokenizer."""
    shutil.copy(POCKET / "drafter" / "tokenizer_config.json", folder)
    source = POCKET / "target" / "tokenizer.json"
    tokenizer = json.loads(source.read_text("utf-8"))
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    assert (folder / "tokenizer.json").read_bytes() != source.read_bytes()
    return folder


@pytest.mark.parametrize(
    "change, parts",
    [(swap_two, ["id 1001 is 'irl', not 'ks'"]), (add_many, ["4196 tokens, not 4096"])],
)
def test_a_drafter_with_another_vocabulary(tmp_path, change, parts):
    target, drafter = POCKET / "target", drafter_with(tmp_path, change)
    with pytest.raises(UserError) as error:
        check_vocabulary(target, drafter, load_tokenizer(target))
    says(error, f"drafter {drafter}", f"target {target}", "another vocabulary", *parts)


def test_a_drafter_with_the_same_vocabulary(tmp_path):
    target = POCKET / "target"
    tokenizer = load_tokenizer(target)
    check_vocabulary(target, POCKET / "drafter", tokenizer)
    check_vocabulary(target, drafter_with(tmp_path, lambda _: None), tokenizer)  # only the bytes differ


@pytest.mark.parametrize(
    "generation, config, expected",
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, {5, 6}),
        ({"eos_token_id": 0}, {"eos_token_id": 7}, {0}),
        ({}, {"eos_token_id": 7}, {7}),
        (None, {"eos_token_id": [7]}, {7}),
        (None, {}, set()),
    ],
)
def test_eos_tokens(tmp_path, generation, config, expected):
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert eos_tokens(tmp_path) == expected


def test_eos_tokens_of_the_pocket_pair():
    assert eos_tokens(POCKET / "target") == eos_tokens(POCKET / "drafter") == {1}


class Trap:
    def __reduce__(self):
        return print, ("this must never run",)


@pytest.mark.parametrize("shards", [1, 2])
def test_bin_weights_are_converted_on_request_only(tmp_path, cli, shards):
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(POCKET / "drafter", old)
    weights = load_file(old / "model.safetensors")
    (old / "model.safetensors").unlink()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # tied, as .bin files have it
    names = sorted(weights)
    if shards == 1:
        torch.save(weights, old / "pytorch_model.bin")
    else:
        where = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
        for file in set(where.values()):
            torch.save({n: weights[n] for n in names if where[n] == file}, old / file)
        (old / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(UserError, match=r"bdcli convert .*old NEW_FOLDER"):
        load_model(old, torch.float32, CPU)
    done = cli("convert", old, new)
    assert done.code == 0 and done.out.strip() == str(new), done.err
    mine, theirs = (load_model(f, torch.float32, CPU).tensors() for f in (new, POCKET / "drafter"))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert load_tokenizer(new).get_vocab() == load_tokenizer(POCKET / "drafter").get_vocab()
    assert "exists" in cli("convert", old, new).err and "safetensors already" in cli("convert", new, tmp_path / "x").err


def test_what_is_not_only_tensors_is_never_opened(tmp_path, cli, capfd):
    shutil.copy(POCKET / "drafter" / "config.json", tmp_path)
    for body, message in ((Trap(), "more than tensors"), ({"epoch": 3}, "no table of tensors")):
        torch.save(body, tmp_path / "pytorch_model.bin")
        found = cli("convert", tmp_path, tmp_path / "new")
        assert found.code == 2 and message in found.err and not (tmp_path / "new").exists()
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK torn")
    assert "pytorch_model.bin is damaged" in cli("convert", tmp_path, tmp_path / "new").err
    (tmp_path / "pytorch_model.bin").unlink()
    assert "does not exist" in cli("convert", tmp_path, tmp_path / "new").err
    assert "this must never run" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("known", "wanted"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, torch.float32),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, torch.bfloat16),
        ({"cpu_name": "Cortex", "bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False}, torch.float32),
    ],
)
def test_training_takes_bf16_where_its_products_are_faster(monkeypatch, known, wanted):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert training_dtype("auto", CPU) is wanted
    assert training_dtype("float32", CPU) is torch.float32 and training_dtype("bfloat16", CPU) is torch.bfloat16


def test_device_and_dtype():
    assert pick_device("cpu") == CPU
    assert pick_dtype("float16", CPU) is torch.float16
    assert pick_dtype("auto", CPU) in (torch.float32, torch.bfloat16)
    with pytest.raises(UserError) as error:
        pick_device("abacus")
    says(error, "--device abacus", "--device cpu")
