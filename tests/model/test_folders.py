"""Model folders that are not what they seem: read as `transformers` reads them, or named in one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bdcli.base.digests as digests
from bdcli.base.errors import UserError
from bdcli.model.build import write_first_layers
from bdcli.model.checkpoint import eos_tokens, fingerprint, load_model, read_config
from bdcli.model.hub import POCKET
from tests.support.folders import CPU, edit, logit_error, pocket_copy, random_folder, random_ids

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EXACT = 1e-4  # fp32 logits of two programs


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def refusal(folder: Path) -> str:
    """What loading a folder is refused with: one line, exit 2."""
    with pytest.raises(UserError) as error:
        load_model(folder, torch.float32, CPU)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    return str(error.value)


# -- what config.json leaves out


@pytest.mark.parametrize(
    "family, config, dropped",
    [
        ("Qwen3", {"head_dim": 128}, {"head_dim": ...}),
        ("Mistral", {"num_attention_heads": 8, "num_key_value_heads": 8}, {"num_key_value_heads": ...}),
        ("Llama", {"num_key_value_heads": 4}, {"num_key_value_heads": ..., "head_dim": ..., "rms_norm_eps": ...}),
        (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
            {"layer_types": ..., "max_window_layers": 2},
        ),
        ("Qwen2", {"tie_word_embeddings": False}, {"tie_word_embeddings": ..., "sliding_window": ...}),
        ("Llama", {}, {"model_type": "llama", "architectures": ...}),
    ],
)
def test_keys_left_out_give_the_logits_of_transformers(tmp_path, family, config, dropped):
    folder = random_folder(family, tmp_path / "m", **config)
    edit(folder / "config.json", **dropped)
    assert logit_error(folder, random_ids(150)) < EXACT


def test_a_window_that_nobody_wrote_down_is_honoured(tmp_path, cli):
    """Mistral's is 4,096: longer texts are refused, shorter ones are those of `transformers`."""
    folder = random_folder("Mistral", tmp_path / "m", max_position_embeddings=8192)
    edit(folder / "config.json", sliding_window=...)
    assert read_config(folder).context_limit == 4096 and logit_error(folder, random_ids(90)) < EXACT
    (tmp_path / "p.txt").write_text("import this\n" * 2000, "utf-8")
    found = cli("decode", tmp_path / "p.txt", "--target", folder, "--drafter", folder)
    assert found.code == 2 and "sliding window of 4096" in found.err


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        {"rope_type": "dynamic", "factor": 4.0},
    ],
)
def test_a_scaled_context_is_read_beyond_its_original(tmp_path, scaling):
    """One forward of the whole text, where `transformers` fixes dynamic frequencies by the same length."""
    folder = random_folder("Llama", tmp_path / "m", max_position_embeddings=256)
    edit(folder / "config.json", rope_scaling=scaling)
    assert read_config(folder).context_limit == 1024 and logit_error(folder, random_ids(700)) < EXACT


# -- heads


def other_head(weights: dict) -> None:
    torch.manual_seed(1)
    weights[HEAD] = weights[EMBEDDING] + 0.1 * torch.randn_like(weights[EMBEDDING])


def same_head(weights: dict) -> None:
    weights[HEAD] = weights[EMBEDDING].clone()


def head_alone(weights: dict) -> None:
    weights[HEAD] = weights.pop(EMBEDDING)


@pytest.mark.parametrize("change, tied", [(other_head, False), (same_head, True), (head_alone, True)])
def test_a_tied_head_with_a_tensor_of_its_own(tmp_path, change, tied):
    folder = random_folder("Llama", tmp_path / "m", tie_word_embeddings=True)
    change_weights(folder, change)
    model = load_model(folder, torch.float32, CPU)
    assert (model.head is model.embedding) == model.config.tied_head == tied
    assert logit_error(folder, random_ids(40)) < EXACT


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("change", [other_head, same_head, head_alone])
def test_convert_keeps_a_head_of_its_own(tmp_path, cli, change, shards):
    folder = random_folder("Llama", tmp_path / "m", tie_word_embeddings=True)
    change_weights(folder, change)
    shutil.copytree(folder, tmp_path / "bin")
    weights = load_file(folder / WEIGHTS)
    (tmp_path / "bin" / WEIGHTS).unlink()
    if shards == 1:
        torch.save(weights, tmp_path / "bin" / "pytorch_model.bin")
    else:
        where = {name: f"pytorch_model-{int(name == HEAD)}.bin" for name in weights}
        for file in set(where.values()):
            torch.save({n: weights[n] for n in weights if where[n] == file}, tmp_path / "bin" / file)
        (tmp_path / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    done = cli("convert", tmp_path / "bin", tmp_path / "new")
    assert done.code == 0, done.err
    want, got = (load_model(f, torch.float32, CPU) for f in (folder, tmp_path / "new"))
    assert torch.equal(want.head, got.head) and torch.equal(want.embedding, got.embedding)
    held = [key for file in (tmp_path / "new").glob("*.safetensors") for key in load_file(file)]
    assert (HEAD in held) == (change is not same_head)


def test_a_model_that_is_saved_again_keeps_its_own_head(tmp_path):
    """A shorter model of a folder whose config says tied, but whose head is not."""
    folder = random_folder("Llama", tmp_path / "m", tie_word_embeddings=True)
    change_weights(folder, other_head)
    write_first_layers(folder, tmp_path / "short", 1, 0)
    whole, short = load_model(folder, torch.bfloat16, CPU), load_model(tmp_path / "short", torch.bfloat16, CPU)
    assert torch.equal(short.head, whole.head) and torch.equal(short.embedding, whole.embedding)
    assert logit_error(tmp_path / "short", random_ids(40)) < EXACT


# -- files


def test_one_file_is_read_before_a_stale_index(tmp_path):
    folder = random_folder("Llama", tmp_path / "m")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "model-00001-of-00009.safetensors"}}))
    assert logit_error(folder, random_ids(30)) < EXACT


def rename(weights: dict, new) -> None:
    for name in list(weights):
        weights[new(name)] = weights.pop(name)


def base_names(weights: dict) -> None:
    rename(weights, lambda name: name.removeprefix("model."))


def test_base_model_names(tmp_path):
    """A tied base model is whole; one without a head is no language model."""
    tied = random_folder("Llama", tmp_path / "tied", tie_word_embeddings=True)
    change_weights(tied, base_names)
    edit(tied / "config.json", architectures=["LlamaModel"])
    assert logit_error(tied, random_ids(40)) < EXACT
    write_first_layers(tied, tmp_path / "short", 1, 0)
    assert logit_error(tmp_path / "short", random_ids(40)) < EXACT
    bare = random_folder("Llama", tmp_path / "bare")
    change_weights(bare, lambda w: (w.pop(HEAD), base_names(w)))
    said = refusal(bare)
    assert "lm_head.weight is missing" in said and "base model" in said and "ForCausalLM" in said


def quantise(dtype: torch.dtype, end: str = "q_proj.weight"):
    def change(weights: dict) -> None:
        for name in [name for name in weights if name.endswith(end)]:
            wide = weights[name].float() * (127 if dtype is torch.int8 else 1)
            weights[name] = (wide.round() if dtype is torch.int8 else wide).to(dtype)

    return change


def pack(end: str):
    def change(weights: dict) -> None:
        for name in [name for name in weights if name.endswith("q_proj.weight")]:
            weights[name.removesuffix(".weight") + end] = weights.pop(name)

    return change


def eagle(weights: dict) -> None:
    for name in (EMBEDDING, HEAD):
        weights.pop(name)
    weights |= {"fc.weight": torch.zeros(64, 128), "d2t": torch.zeros(32, dtype=torch.int64)}


@pytest.mark.parametrize(
    "change, parts",
    [
        (quantise(torch.int8), ["quantised", "q_proj.weight is int8", "bfloat16"]),
        (quantise(torch.float8_e4m3fn), ["quantised", "float8_e4m3fn"]),
        (quantise(torch.uint8, "embed_tokens.weight"), ["quantised", "embed_tokens.weight is uint8"]),
        (pack(".qweight"), ["quantised (GPTQ or AWQ)"]),
        (pack(".weight_packed"), ["quantised (compressed-tensors)"]),
        (lambda w: w.update({"model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(1)}), ["quantised (fp8"]),
        (lambda w: w.update({"model.layers.0.self_attn.q_proj.SCB": torch.ones(1)}), ["quantised (bitsandbytes)"]),
        (eagle, ["EAGLE", "--drafter self"]),
        (lambda w: w.update({"model.layers.0.q_proj.lora_A.weight": torch.ones(1)}), ["LoRA", "merge_and_unload"]),
        (lambda w: rename(w, lambda name: "_orig_mod." + name), ["embed_tokens.weight is missing", "_orig_mod."]),
    ],
)
def test_weights_of_another_kind(tmp_path, change, parts):
    folder = random_folder("Llama", tmp_path / "m")
    change_weights(folder, change)
    said = refusal(folder)
    assert not [part for part in parts if part not in said], said


def test_adapters(tmp_path, cli):
    folder = random_folder("Llama", tmp_path / "m")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "meta/base"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    said = refusal(folder)
    assert "LoRA adapter of meta/base beside the model" in said and "remove adapter_config.json" in said
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (tmp_path / "p.txt").write_text("import this\n" * 50)
    for role in ("target", "drafter"):
        found = cli("decode", tmp_path / "p.txt", f"--{role}", folder)
        assert found.code == 2 and "is a LoRA adapter of meta/base, not a model" in found.err
        found = cli("bench", f"--{role}", folder, "--ctx", "128", "--quick", "--dry-run")
        assert found.code == 2 and "is a LoRA adapter" in found.err


# -- EOS and identity


@pytest.mark.parametrize("eos", [[[1]], "1", [1, "2"], True, 1.0, {"a": 1}])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_eos_tokens_are_ids(tmp_path, eos, file):
    (tmp_path / file).write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(UserError, match="eos_token_id = ") as error:
        eos_tokens(tmp_path)
    assert file in str(error.value) and error.value.exit_code == 2


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """A store of digests that no other test uses, for files of any size."""
    monkeypatch.setattr(digests, "_store", lambda: tmp_path / "cache" / "digests.json")
    monkeypatch.setattr(digests, "CACHED_BYTES", 1)
    return tmp_path / "cache" / "digests.json"


@pytest.mark.usefixtures("own_cache")
def test_a_fingerprint_changes_with_every_byte_that_makes_a_text(tmp_path):
    folder = pocket_copy("drafter", tmp_path / "m")
    seen = [fingerprint(folder)]
    size = (folder / WEIGHTS).stat().st_size
    assert size > 2**22  # the middle is far from both ends
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(size // 2)
        byte = file.read(1)
        file.seek(size // 2)
        file.write(bytes([byte[0] ^ 1]))
    seen.append(fingerprint(folder))
    for name, change in (
        ("generation_config.json", {"eos_token_id": 2}),
        ("tokenizer_config.json", {"eos_token": "<s>"}),
        ("tokenizer.json", {"post_processor": {}}),
        ("config.json", {"rope_theta": 9.0}),
    ):
        edit(folder / name, **change)
        seen.append(fingerprint(folder))
    (folder / "README.md").write_text("a card says nothing of a text")
    assert len(set(seen)) == 6 and fingerprint(folder) == seen[-1]
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(copy) == seen[-1]


def test_a_digest_is_paid_once_for_each_state_of_a_file(tmp_path, own_cache, monkeypatch):
    path, read = tmp_path / "w.bin", []
    path.write_bytes(b"a" * 100)
    plain = digests._digest
    monkeypatch.setattr(digests, "_digest", lambda p: (read.append(p), plain(p))[1])
    first = digests.file_digest(path)
    assert digests.file_digest(path) == first and len(read) == 1
    path.write_bytes(b"b" * 100)
    assert digests.file_digest(path) != first and len(read) == 2
    os.utime(path, ns=(1, 1))  # as a copy that keeps its times
    assert digests.file_digest(path) == digests.file_digest(path) and len(read) == 3
    own_cache.write_text("torn {")
    assert digests.file_digest(path) == plain(path) and json.loads(own_cache.read_text())


def test_a_home_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "CACHED_BYTES", 1)
    path = POCKET / "target" / "config.json"
    for store in (None, tmp_path / "file" / "digests.json"):
        (tmp_path / "file").write_text("no folder")
        monkeypatch.setattr(digests, "_store", lambda place=store: place)
        assert digests.file_digest(path) == digests._digest(path)
