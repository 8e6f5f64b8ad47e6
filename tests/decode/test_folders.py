"""Folders whose tokens or positions are not those of a plain model, decoded from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from bdcli.data.prompts import encode, encode_documents
from bdcli.model.hub import POCKET
from bdcli.model.tokenizer import load_tokenizer
from tests.support.cli import compiled_only
from tests.support.folders import (
    APPENDS_EOS,
    add_token,
    edit,
    pad_vocabulary,
    pocket_copy,
    random_folder,
    reference_text,
)

ENGINES = ["torch", pytest.param("compiled", marks=compiled_only)]


@pytest.fixture
def decode(cli):
    """`bdcli decode --json` in fp32."""

    def run(*args: object):
        common = ("--gamma", "4", "--max-new-tokens", "24", "--dtype", "float32", "--baseline", "off", "--json")
        return cli("decode", *common, *args)

    return run


@pytest.fixture
def text(tmp_path, cli) -> Path:
    """A prompt of 300 tokens."""
    assert cli("prompt", "--ctx", "300", "--out", tmp_path / "text.txt").code == 0
    return tmp_path / "text.txt"


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    ],
)
def test_a_scaled_context_is_decoded_as_transformers_decodes_it(tmp_path, cli, decode, scaling):
    folder = random_folder("Llama", tmp_path / "m", max_position_embeddings=1024)
    edit(folder / "config.json", rope_scaling=scaling)
    prompt = tmp_path / "long.txt"
    assert cli("prompt", "--ctx", "1500", "--out", prompt).code == 0
    found = decode(prompt, "--target", folder, "--drafter", folder, "--budget", "full")
    assert found.code == 0, found.err
    ids = encode(load_tokenizer(folder), prompt.read_text("utf-8"))
    assert found.json["tokens"] == reference_text(folder, ids, 24)
    plan = ("--ctx", "3k", "--budgets", "full", "--methods", "ar,bd", "--quick", "--dry-run")
    assert cli("bench", "--target", folder, "--drafter", folder, *plan).code == 0
    beyond = cli("bench", "--target", folder, "--drafter", folder, "--ctx", "4096", *plan[2:])
    assert beyond.code == 2 and "exceed the 4096 positions" in beyond.err


def test_a_dynamic_context_acts_beyond_its_original(tmp_path, cli, decode):
    """Frequencies are those of prompt and new tokens together; within the original length they are the plain ones."""
    folder = random_folder("Llama", tmp_path / "m", max_position_embeddings=1024)
    prompt = tmp_path / "long.txt"
    assert cli("prompt", "--ctx", "1500", "--out", prompt).code == 0
    texts = []
    for scaling in ({"rope_type": "dynamic", "factor": 4.0}, {"rope_type": "linear", "factor": 2.0}):
        edit(folder / "config.json", rope_scaling=scaling)
        found = decode(prompt, "--target", folder, "--drafter", folder, "--check")
        assert found.code == 0 and found.json["output_equal"], found.err
        texts.append(found.json["tokens"])
    assert texts[0] != texts[1]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", ["end", "middle"])
def test_a_token_without_an_embedding_is_named(tmp_path, decode, text, engine, place):
    pair = {role: pocket_copy(role, tmp_path / role) for role in ("target", "drafter")}
    for folder in pair.values():
        add_token(folder)
    body = text.read_text("utf-8")
    text.write_text(body + "<extra>" if place == "end" else body[:300] + "<extra>" + body[300:], "utf-8")
    names = [argument for role, folder in pair.items() for argument in (f"--{role}", folder)]
    found = decode(text, *names, "--engine", engine, "--check")
    assert found.code == 2 and "'<extra>' has id 4096" in found.err and "4096 rows" in found.err


def test_a_token_without_an_embedding_is_named_before_measuring(tmp_path, cli, text):
    folder = pocket_copy("target", tmp_path / "t")
    add_token(folder)
    body = text.read_text("utf-8")
    text.write_text((body[:300] + "<extra>" + body[300:]) * 4, "utf-8")
    plan = ("--prompts", text, "--ctx", "256", "--budgets", "128", "--methods", "ar,bd", "--quick", "--dry-run")
    found = cli("bench", "--target", folder, *plan)
    assert found.code == 2 and "'<extra>' has id 4096" in found.err


def test_an_eos_that_the_tokenizer_appends_is_no_part_of_a_prompt(tmp_path, cli, decode, text):
    plain = decode(text, "--target", "pocket")
    folder = pocket_copy("target", tmp_path / "t")
    edit(folder / "tokenizer.json", post_processor=APPENDS_EOS)
    tokenizer, bare = load_tokenizer(folder), load_tokenizer(POCKET / "target")
    assert tokenizer("x")["input_ids"][-1] == 1
    assert encode(tokenizer, "import os") == encode(bare, "import os") == bare("import os")["input_ids"]
    assert encode(tokenizer, "a</s>") == [*bare("a")["input_ids"], 1]  # one that is written stays
    assert encode_documents(tokenizer, ["a", "b c"]) == [encode(bare, "a"), encode(bare, "b c")]
    found = decode(text, "--target", folder)
    assert found.code == 0 and found.json["context"] == 300 and found.json["tokens"] == plain.json["tokens"]
    cut = cli("prompt", "--ctx", "200", "--target", folder)
    assert len(bare(cut.out)["input_ids"]) in (200, 201)  # print adds a line break


CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("names_eos", [True, False])
def test_a_chat_ends_with_the_tokenizers_eos_too(tmp_path, decode, text, names_eos):
    """The turn's own end is not in generation_config.json; a base text keeps to the model's."""
    folder = pocket_copy("target", tmp_path / "t", **({} if names_eos else {"eos_token_id": ...}))
    plain = decode(text, "--target", folder).json["tokens"]
    end = next(n for n in range(3, len(plain)) if plain[n] not in plain[:n])
    token = load_tokenizer(folder).convert_ids_to_tokens(plain[end])
    edit(folder / "tokenizer_config.json", eos_token=token, chat_template=CHAT)
    if not names_eos:
        (folder / "generation_config.json").unlink()
    base, chat = decode(text, "--target", folder), decode(text, "--target", folder, "--chat")
    assert base.code == chat.code == 0, chat.err
    assert len(base.json["tokens"]) == 24 and base.json["finish_reason"] == "length"
    assert chat.json["tokens"] == plain[: end + 1] and chat.json["finish_reason"] == "stop"
    assert ("names no EOS token" in base.err) == (not names_eos) and "names no EOS token" not in chat.err


def test_a_drafter_of_fewer_positions(tmp_path, cli, decode):
    """It runs whatever its view needs; what exceeds its positions is noted, in decode and in bench alike."""
    drafter = pocket_copy("drafter", tmp_path / "d", max_position_embeddings=512)
    prompt = tmp_path / "long.txt"
    assert cli("prompt", "--ctx", "900", "--out", prompt).code == 0
    said = {}
    for kind in (("--budget", "256"), ("--budget", "full"), ("--budget", "256", "--positions", "absolute")):
        found = decode(prompt, "--drafter", drafter, "--check", *kind)
        assert found.code == 0 and found.json["output_equal"], found.err
        said[kind[1:]] = "the drafter was made for 512 positions" in found.err
    assert said == {("256",): False, ("full",): True, ("256", "--positions", "absolute"): True}
    common = ("--drafter", drafter, "--ctx", "900", "--budgets", "256,full", "--methods", "ar,bd", "--dry-run")
    plan = cli("bench", *common)
    assert plan.code == 0 and "bd-full: the drafter was made for 512 positions" in plan.out + plan.err
    assert "bd-256: the drafter" not in plan.out + plan.err
    own = cli("bench", "--target", drafter, *common)
    assert own.code == 2 and "exceed the 512 positions" in own.err


def test_a_padded_pair_writes_what_the_target_writes(tmp_path, decode, text):
    want = decode(text).json["tokens"]
    for role in ("target", "drafter"):
        folder = pad_vocabulary(pocket_copy(role, tmp_path / role), 4224)
        found = decode(text, f"--{role}", folder)
        assert found.code == 0 and found.json["tokens"] == want, found.err
