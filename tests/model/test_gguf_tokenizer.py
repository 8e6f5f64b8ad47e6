"""Tokenizers of GGUF files: ids, special tokens, ends and chat templates of the originals."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bdcli.base.errors import UserError
from bdcli.model.gguf.file import open_gguf
from bdcli.model.gguf.tokenizer import SPLITTINGS, build_tokenizer, end_tokens
from bdcli.model.hub import POCKET
from bdcli.model.tokenizer import load_tokenizer
from tests.support.gguf import ORIGINALS, PROBE, alphabet, byte_level_metadata, digest_of, write_file

TEXTS = [
    PROBE, "", " ", "  two spaces before", "\n\n\t", "def f(x: int) -> str:\r\n    return f'{x!r}'  # 1234567\n",
    "Cửa Việt é e\u0301 ½ ²", "漢字かな交じり文 한국어", "🙂🙂 👨‍👩‍👧‍👦", "I'LL don't CAN'T", "a_b__c--d",
    "0x1F 3.14e-10", "<s> and </s> in text", "\u00a0no-break\u3000wide",
]  # fmt: skip
POCKET_JSON = POCKET / "target" / "tokenizer.json"


def tokenizer_of(tmp_path, metadata: dict):
    path = write_file(tmp_path / "t.gguf", {"llama.context_length": 512} | metadata, {})
    return load_tokenizer(path)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, verbose=False)["input_ids"]


def test_pocket_has_the_ids_of_its_own_tokenizer(tmp_path):
    more = {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1}
    ours, theirs = (
        tokenizer_of(tmp_path, byte_level_metadata(POCKET_JSON, "gpt-2") | more),
        load_tokenizer(POCKET / "target"),
    )
    assert ours.get_vocab() == theirs.get_vocab() and len(ours) == len(theirs)
    for text in TEXTS:
        assert ids(ours, text) == ids(theirs, text), text
        for skip in (True, False):
            got, want = (t.decode(ids(t, text), skip_special_tokens=skip) for t in (ours, theirs))
            assert got == want
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
    assert ours.model_max_length == 512


# Parts of the published tokenizer.json files, with pocket's vocabulary.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")


def splitting(pattern: str) -> dict:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


PUBLISHED = {
    "llama-bpe": {"pre_tokenizer": splitting(LLAMA_3), "ignore_merges": True},
    "qwen2": {"pre_tokenizer": splitting(QWEN_2), "normalizer": {"type": "NFC"}},
    "smollm": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        }
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_texts_are_cut_as_the_published_tokenizers_cut_them(tmp_path, name):
    from tokenizers import Tokenizer

    parsed, parts = json.loads(POCKET_JSON.read_text("utf-8")), dict(PUBLISHED[name])
    parsed["model"]["ignore_merges"] = parts.pop("ignore_merges", False)
    word = "straightforwardly"  # in the vocabulary, and nothing merges to it
    assert word not in parsed["model"]["vocab"]
    parsed["model"]["vocab"][word] = 4096
    theirs = Tokenizer.from_str(json.dumps(parsed | parts))
    metadata = byte_level_metadata(POCKET_JSON, name)
    metadata["tokenizer.ggml.tokens"] += [word]
    metadata["tokenizer.ggml.token_type"] += [1]
    ours = tokenizer_of(tmp_path, metadata | {"tokenizer.ggml.add_bos_token": False})
    plain = load_tokenizer(POCKET / "target")
    for text in (*TEXTS, word):
        assert ids(ours, text) == theirs.encode(text).ids, text
    assert any(ids(ours, text) != ids(plain, text) for text in TEXTS)
    assert (ids(ours, word) == [4096]) == (name == "llama-bpe")


def spm_metadata(more: dict | None = None) -> dict:
    """A SentencePiece vocabulary: three control tokens, all bytes, letters, and words in the order of their scores."""
    letters = [*"▁abcdefghilmnorstuw.,é漢"]
    words = [
        "▁t",
        "he",
        "▁the",
        "in",
        "▁a",
        "er",
        "on",
        "▁▁",
        "▁▁▁▁",
        "and",
        "▁and",
        "th",
        "▁th",
        "ere",
        "▁there",
        "ing",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *words, "[PAD299]"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(letters) + len(words)), 5]
    scores = [0.0] * 259 + [-1000.0 - i for i in range(len(letters))] + [-float(i) for i in range(len(words))] + [-1e4]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
    } | (more or {})


def sentencepiece_ids(metadata: dict, text: str, prefix: bool = True) -> list[int]:
    """SentencePiece's rule: join the neighbours whose token scores highest, the leftmost of equal ones, to the end."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    place = {token: i for i, token in enumerate(tokens)}
    pieces = [*((" " if prefix and text else "") + text).replace(" ", "▁")]
    while True:
        joined = [(scores[place[a + b]], -i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in place]
        if not joined:
            break
        at = -max(joined)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    found = []
    for piece in pieces:
        found += [place[piece]] if piece in place else [place[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return found


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_merges_by_score(tmp_path, prefix):
    metadata = spm_metadata({} if prefix else {"tokenizer.ggml.add_space_prefix": False})
    tokenizer = tokenizer_of(tmp_path, metadata)
    random = np.random.default_rng()
    made = ["".join(random.choice([*"theinrgand   .é漢q\n"], 40)) for _ in range(30)]
    for text in ["the thing and there", "  the", "the ", "\n the\tü🙂", " ", *made]:
        got = ids(tokenizer, text)
        assert got == [1, *sentencepiece_ids(metadata, text, prefix)], text
        assert tokenizer.decode(got, skip_special_tokens=True) == text
    assert "[PAD299]" not in tokenizer.get_vocab() and tokenizer.unk_token == "<unk>"
    assert end_tokens(open_gguf(tmp_path / "t.gguf")) == {2}


def test_sentencepiece_scores_that_say_nothing_are_refused(tmp_path):
    metadata = spm_metadata()
    metadata["tokenizer.ggml.scores"] = [-1000.0] * len(metadata["tokenizer.ggml.tokens"])
    with pytest.raises(UserError, match=r"all tokens have the score -1000.0, so no merge is known"):
        tokenizer_of(tmp_path, metadata)


CHAT = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def special(names: list[str], kinds: list[int]) -> dict:
    metadata = alphabet()
    metadata["tokenizer.ggml.tokens"] += names
    metadata["tokenizer.ggml.token_type"] += kinds
    return metadata


NAMES, KINDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "<|eom_id|>"], [3, 3, 3, 4, 3]


def test_special_tokens_are_matched_whole_and_left_out_of_text(tmp_path):
    tokenizer = tokenizer_of(tmp_path, special(NAMES, KINDS))
    text = "a<|im_start|>b<think>c<|im_end|>"
    got = ids(tokenizer, text)
    assert [i for i in got if i > 256] == [258, 260, 259]
    assert tokenizer.decode(got) == text and tokenizer.decode(got, skip_special_tokens=True) == "ab<think>c"
    assert (tokenizer.bos_token, tokenizer.eos_token) == (None, None)


@pytest.mark.parametrize(
    "pre, given, begin, end",
    [
        ("gpt-2", {}, [], []),
        ("llama-bpe", {}, [257], []),
        ("llama-bpe", {"add_bos_token": False}, [], []),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, [257], [259]),
    ],
)
def test_the_file_decides_about_bos_and_eos(tmp_path, pre, given, begin, end):
    flags = {f"tokenizer.ggml.{name}": value for name, value in given.items()}
    named = {"tokenizer.ggml.bos_token_id": 257, "tokenizer.ggml.eos_token_id": 259, "tokenizer.ggml.pre": pre}
    tokenizer = tokenizer_of(tmp_path, special(NAMES, KINDS) | named | flags)
    assert ids(tokenizer, "ab") == [*begin, 256, *end]
    assert tokenizer("ab", add_special_tokens=False)["input_ids"] == [256]


@pytest.mark.parametrize(
    "given, template, want",
    [
        ({"eos": 257}, None, {257}),
        ({"eos": 257, "eot": 259, "eom": 261}, None, {257, 259, 261}),
        ({"eos": 257}, CHAT, {257, 259}),  # what the template ends a turn with
        ({"eos": 999}, CHAT, {259}),
        ({}, None, set()),
    ],
)
def test_a_text_ends_with_eos_or_a_turn(tmp_path, given, template, want):
    named = {f"tokenizer.ggml.{name}_token_id": i for name, i in given.items()}
    metadata = special(NAMES, KINDS) | named | {"tokenizer.chat_template": template}
    path = write_file(tmp_path / "t.gguf", {"llama.context_length": 512} | metadata, {})
    assert end_tokens(open_gguf(path)) == want


def test_the_chat_template_comes_from_the_file(tmp_path):
    named = {"tokenizer.ggml.bos_token_id": 257, "tokenizer.chat_template": CHAT}
    tokenizer = tokenizer_of(tmp_path, special(NAMES, KINDS) | named)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert text == "<|endoftext|><|im_start|>ab<|im_end|>"


REFUSED = {
    "no tokenizer": ({"tokenizer.ggml.model": None}, "holds no tokenizer .tokenizer.ggml.model is missing"),
    "another kind": ({"tokenizer.ggml.model": "t5"}, "tokenizer t5 is not supported, only gpt2 and llama"),
    "another way to cut": ({"tokenizer.ggml.pre": "deepseek-llm"}, "as deepseek-llm, which is not known.*smollm"),
    "no way to cut": ({"tokenizer.ggml.pre": None}, "does not say how to split a text.*llama.cpp"),
    "no merges": ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
    "half a merge": ({"tokenizer.ggml.merges": ["ab"]}, "merge 'ab' has one side"),
    "a merge of nothing": ({"tokenizer.ggml.merges": ["ab zz"]}, "the tokenizer cannot be built"),
    "a token twice": ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "token 'a' is in the vocabulary twice"),
    "too few types": ({"tokenizer.ggml.token_type": [1, 1]}, "257 tokens and 2 types"),
    "a list for a name": ({"tokenizer.chat_template": [1, 2]}, "tokenizer.chat_template is a list, not a str"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tokenizers_that_cannot_be_built(tmp_path, name):
    changes, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as error:
        tokenizer_of(tmp_path, alphabet() | changes)
    assert "\n" not in str(error.value)


VOCABULARIES = os.environ.get("BDCLI_GGML_VOCABULARIES", "")


@pytest.mark.skipif(not VOCABULARIES, reason="BDCLI_GGML_VOCABULARIES: the folder models/ of llama.cpp's sources")
@pytest.mark.parametrize("name", ["llama-bpe", "llama-spm", "qwen2", "gpt-2", "starcoder", "refact"])
def test_real_vocabularies_have_the_ids_of_the_originals(name):
    file = Path(VOCABULARIES) / f"ggml-vocab-{name}.gguf"
    tokenizer = build_tokenizer(open_gguf(file))
    texts, answers = (file.with_suffix(f".gguf.{end}").read_text("utf-8") for end in ("inp", "out"))
    for text, answer in zip(texts.split("\n__ggml_vocab_test__\n"), answers.split("\n"), strict=True):
        got = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert got == [int(i) for i in answer.split()], text
        assert tokenizer.decode(got) == text
    if name in ORIGINALS:
        found = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        assert ORIGINALS[name] in {digest_of(found), digest_of([128000, *found])}


def test_every_way_to_cut_a_text_has_a_name_of_llama_cpp():
    assert set(ORIGINALS) <= set(SPLITTINGS)
