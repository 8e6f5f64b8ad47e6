"""GGUF files that are split, named oddly, damaged, or say what is not computed here: one line each."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from bdcli.base.errors import UserError
from bdcli.model.checkpoint import load_model, read_config
from bdcli.model.gguf.file import open_gguf
from bdcli.model.hub import POCKET, resolve
from bdcli.model.tokenizer import load_tokenizer
from tests.support.gguf import add_value, alphabet, write_file

CPU = torch.device("cpu")
METADATA = {
    "llama.context_length": 64, "llama.embedding_length": 32, "llama.block_count": 2, "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.rope.freq_base": 10000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.eos_token_id": 1,
}  # fmt: skip
SHAPES = {
    "attn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
    "ffn_norm": (32,), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64),
}  # fmt: skip


def tensors() -> dict[str, np.ndarray]:
    shapes = {f"blk.{i}.{name}.weight": shape for i in range(2) for name, shape in SHAPES.items()}
    shapes |= {"token_embd.weight": (257, 32), "output_norm.weight": (32,)}
    random = np.random.default_rng(1)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def says(error: pytest.ExceptionInfo, *parts: str) -> None:
    assert not [part for part in parts if part not in str(error.value)], str(error.value)
    assert "\n" not in str(error.value) and error.value.exit_code == 2


KEYS = {
    "another architecture": ({"general.architecture": "gemma3"}, ["architecture gemma3", "llama (Llama 2/3, Mistral)"]),
    "experts": ({"llama.expert_count": 8}, ["llama.expert_count is 8", "Hugging Face folder"]),
    "a scale of attention": ({"llama.attention.scale": 0.5}, ["llama.attention.scale is 0.5"]),
    "a missing key": ({"llama.block_count": None}, ["lacks llama.block_count"]),
    "other values than keys": ({"llama.attention.value_length": 16}, ["value_length is 16; the head dimension is 8"]),
    "a partial rotation": ({"llama.rope.dimension_count": 4}, ["rope.dimension_count is 4; the head dimension is 8"]),
    "layers of different heads": (
        {"llama.attention.head_count_kv": [2, 1]},
        ["head_count_kv is [2, 1]", "equal in all layers"],
    ),
    "no heads": ({"llama.attention.head_count": 0}, ["head_count is 0", "positive"]),
    "heads that do not fit": ({"llama.attention.head_count_kv": 3}, ["4 heads over 3 KV heads"]),
    "positions of another kind": ({"llama.rope.scaling.type": "longrope"}, ["scaling.type is longrope", "yarn"]),
    "another extrapolation": (
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_ext_factor": 0.5},
        ["yarn_ext_factor is 0.5"],
    ),
    "a factor of attention without yarn": ({"llama.rope.scaling.attn_factor": 2.0}, ["attn_factor is 2.0"]),
    "sections of positions": ({"llama.rope.dimension_sections": [1, 2, 1, 0]}, ["dimension_sections is [1, 2, 1, 0]"]),
    "no number": ({"llama.rope.freq_base": float("inf")}, ["rope.freq_base is inf"]),
    "a reader of both sides": ({"llama.attention.causal": False}, ["attention.causal is False"]),
}


@pytest.mark.parametrize("name", KEYS)
def test_metadata_that_cannot_be_honoured(tmp_path, name):
    changes, parts = KEYS[name]
    changes = dict(changes)
    architecture = changes.pop("general.architecture", "llama")
    metadata = {k.replace("llama", architecture): v for k, v in (METADATA | changes).items()}
    path = write_file(tmp_path / "m.gguf", metadata, tensors())
    with pytest.raises(UserError) as error:
        load_model(path, torch.float32, CPU)
    says(error, str(path), *parts)


def without(name: str):
    return lambda t: t.pop(name)


TENSORS = {
    "a tensor is missing": (without("blk.1.attn_q.weight"), ["blk.1.attn_q.weight is missing"]),
    "the embedding is missing": (without("token_embd.weight"), ["token_embd.weight is missing"]),
    "a tensor more": (
        lambda t: t.update({"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}),
        ["1 tensors have no place", "blk.0.attn_q_norm.weight"],
    ),
    "a bias of one side": (
        lambda t: t.update({"blk.0.attn_output.bias": np.ones(32, np.float32)}),
        ["1 tensors have no place", "blk.0.attn_output.bias"],
    ),
    "another shape": (
        lambda t: t.update({"blk.0.ffn_up.weight": np.ones((60, 32), np.float32)}),
        ["blk.0.ffn_up.weight has shape (60, 32)", "(64, 32)"],
    ),
    "too few divisors": (
        lambda t: t.update({"rope_freqs.weight": np.ones(3, np.float32)}),
        ["rope_freqs.weight is not 4 positive numbers"],
    ),
    "a divisor of 0": (
        lambda t: t.update({"rope_freqs.weight": np.zeros(4, np.float32)}),
        ["rope_freqs.weight is not 4 positive numbers"],
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit(tmp_path, name):
    change, parts = TENSORS[name]
    found = tensors()
    change(found)
    path = write_file(tmp_path / "m.gguf", METADATA, found)
    with pytest.raises(UserError) as error:
        load_model(path, torch.float32, CPU)
    says(error, str(path), *parts)


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.IQ4_XS])
def test_a_type_that_is_not_read_is_named_with_what_to_do(tmp_path, kind):
    from gguf import GGML_QUANT_SIZES

    found = tensors() | {"blk.1.ffn_up.weight": np.zeros((64, GGML_QUANT_SIZES[kind][1]), np.uint8)}
    kinds = {"blk.1.ffn_up.weight": kind}
    path = write_file(tmp_path / "m.gguf", METADATA, found, kind=lambda name, _: kinds.get(name, Kind.F32))
    with pytest.raises(UserError) as error:
        read_config(path)
    says(error, f"blk.1.ffn_up.weight is {kind.name}", "llama-quantize to Q4_K_M", "Hugging Face folder")


def test_the_window_of_a_file_is_honoured(tmp_path):
    for window, want in ((48, 48), (0, None)):
        more = METADATA | {"llama.attention.sliding_window": window}
        assert read_config(write_file(tmp_path / "m.gguf", more, tensors())).sliding_window == want


@pytest.fixture
def whole(tmp_path):
    path = write_file(tmp_path / "m.gguf", METADATA | alphabet(), tensors())
    load_model(path, torch.float32, CPU)
    return path


def test_a_file_cut_anywhere_is_one_line(whole):
    content, cuts = whole.read_bytes(), np.random.default_rng().integers(1, whole.stat().st_size, 60)
    start = open_gguf(whole).tensors["token_embd.weight"].start
    for cut in (0, 3, 4, 8, 20, 24, 30, start, len(content) - 100, *cuts.tolist()):
        whole.write_bytes(content[:cut])
        with pytest.raises(UserError) as error:
            load_model(whole, torch.float32, CPU)
        says(error, str(whole), "Download it again")


def test_a_damaged_header_is_one_line(whole):
    """Any byte of the header changed: the file is refused or read, and nothing else happens."""
    content, random = whole.read_bytes(), np.random.default_rng()
    end = min(tensor.start for tensor in open_gguf(whole).tensors.values())
    refused = 0
    for _ in range(80):
        broken = bytearray(content)
        for at in random.integers(0, end, 3):
            broken[at] = random.integers(256)
        whole.write_bytes(broken)
        try:
            read_config(whole)
            load_tokenizer(whole)
        except UserError as error:
            assert "\n" not in str(error), str(error)
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    "start, parts",
    [
        (b"GGUF\x01\0\0\0", ["has GGUF version 1", "llama.cpp"]),
        (b"GGUF\0\0\0\x03", ["is big-endian"]),
        (b"PK\x03\x04", ["is not a GGUF file"]),
    ],
)
def test_files_of_other_formats(whole, start, parts):
    whole.write_bytes(start + whole.read_bytes()[len(start) :])
    with pytest.raises(UserError) as error:
        read_config(whole)
    says(error, str(whole), *parts)


@pytest.fixture
def split(tmp_path):
    """A model in three files."""
    from gguf import GGUFWriter

    folder = tmp_path / "split"
    folder.mkdir()
    parts, names = [], sorted(tensors())
    for number in range(3):
        path = folder / f"m-{number + 1:05}-of-00003.gguf"
        writer = GGUFWriter(path, "llama")
        for key, value in ((METADATA | alphabet()) if number == 0 else {}).items():
            add_value(writer, key, value)
        add_value(writer, "split.count", 3)
        add_value(writer, "split.no", number)
        writer.add_int32("split.tensors.count", len(names))
        for name in names[number::3]:
            writer.add_tensor(name, tensors()[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parts.append(path)
    return parts


def test_a_split_file_is_found_by_any_part(split, whole):
    want = load_model(whole, torch.float32, CPU).tensors()
    for name in (*split, split[0].parent):
        path = resolve(str(name), "target")
        assert path == split[0]
        assert all(torch.equal(a, b) for a, b in zip(load_model(path, torch.float32, CPU).tensors(), want, strict=True))
    assert load_tokenizer(split[0])("ab")["input_ids"] == load_tokenizer(whole)("ab")["input_ids"] == [256]


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_missing_part_is_named(split, gone):
    split[gone].unlink()
    for name in (split[0], split[2], split[0].parent):
        with pytest.raises(UserError) as error:
            resolve(str(name), "target")
        says(error, f"{split[gone]} is missing: the model has 3 parts")


def test_parts_of_another_model_are_noticed(split, tmp_path):
    shutil.copy(split[0], tmp_path / "alone.gguf")
    with pytest.raises(UserError) as error:
        read_config(tmp_path / "alone.gguf")
    says(error, "alone.gguf is one of 3 parts", "-00001-of-00003.gguf")
    shutil.copy(split[1], split[2])
    with pytest.raises(UserError) as error:
        read_config(split[0])
    says(error, str(split[2]), "is in another part too")


def test_names_lead_to_files(whole, tmp_path, monkeypatch):
    assert resolve(str(whole), "target") == resolve(str(tmp_path), "drafter") == whole
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/m.gguf", "target") == whole
    shutil.copy(whole, tmp_path / "n.gguf")
    with pytest.raises(UserError) as error:
        resolve(str(tmp_path), "target")
    says(error, "holds several models: m.gguf, n.gguf", "Name one")
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path), "target") == tmp_path
    with pytest.raises(UserError) as error:
        resolve(str(tmp_path / "none.gguf"), "drafter")
    says(error, "none.gguf: no such file", "pocket", "smollm2")


def test_a_drafter_of_another_vocabulary_is_refused(whole, cli, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("some text")
    done = cli("decode", "--target", POCKET / "target", "--drafter", whole, prompt)
    assert done.code == 2 and f"drafter {whole} has another vocabulary" in done.err
