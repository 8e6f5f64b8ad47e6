"""Prompts: read, cut to a length, trimmed, put into a chat template, and what they spell."""

import copy
import random
import shutil
import time

import pytest

from bdcli.base.errors import UserError
from bdcli.base.progress import SILENT
from bdcli.data import prompts
from bdcli.data.corpus import _stream
from bdcli.data.document import Unread
from bdcli.data.prompts import cut_prompt, encode, encode_document, fit, pieces, shorten, special_tokens_note
from bdcli.data.samples import load_samples
from bdcli.data.sources import documents
from bdcli.data.split import TrainingDocuments, held_out_prompts, held_out_windows
from bdcli.model.hub import POCKET
from bdcli.model.tokenizer import load_tokenizer

SPELLED = "one </s> two <s> three </s> four. " * 200
LINES = {
    "letters": "a" * 2_000_000,
    "spaces": " " * 2_000_000,
    "base64": "".join(
        random.Random(1).choices("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", k=2_000_000)
    ),
    "han": "".join(random.Random(2).choices("的一是不了人我在有他这为之大来以个中上们", k=700_000)),
    "digits": "0123456789" * 200_000,
}


def test_chat_applies_the_tokenizers_own_template(pocket):
    tokenizer = copy.deepcopy(pocket[2])
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\nbot:{% endfor %}"
    assert tokenizer.decode(encode(tokenizer, " hi ", chat=True)) == "<s>user:  hi \nbot:"
    assert tokenizer.decode(encode(tokenizer, " hi ")) == " hi "


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no\nway') }}",
        "{% for m in messages %}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
        "{% include 'other' %}",
        "{{ messages | unknown_filter }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_a_template_that_raises_is_a_line_that_names_it(template, pocket):
    tokenizer = copy.deepcopy(pocket[2])
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"the chat template of .*target fails") as error:
        encode(tokenizer, "hi", chat=True)
    assert "\n" not in str(error.value)


def test_a_template_may_stand_in_a_file_of_its_own(tmp_path):
    for name, template in (("good", "<s>{{ messages[0].content }}</s>"), ("bad", "{% if %}")):
        shutil.copytree(POCKET / "target", tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(template)
    good, bad = (load_tokenizer(tmp_path / name) for name in ("good", "bad"))
    ids = encode(good, "hi", chat=True)
    assert ids[0] == good.bos_token_id and ids[-1] == good.eos_token_id
    with pytest.raises(UserError, match="chat template"):
        encode(bad, "hi", chat=True)


def test_trim_keeps_head_and_tail():
    ids = list(range(1000))
    kept = fit(ids, 100, 20, "middle")
    assert len(kept) == 80 and kept[:20] == ids[:20] and kept[20:] == ids[-60:]
    assert fit(ids[:80], 100, 20, None) == ids[:80]
    with pytest.raises(UserError, match="1000 prompt"):
        fit(ids, 100, 20, None)


# -- special tokens that a text spells


def test_special_tokens_that_a_prompt_spells_are_counted_and_may_be_text(pocket):
    tokenizer = pocket[2]
    ids = encode(tokenizer, SPELLED)
    assert ids == tokenizer(SPELLED)["input_ids"] and ids.count(1) == 400
    literal = encode(tokenizer, SPELLED, special="text")
    assert not {0, 1} & set(literal) and tokenizer.decode(literal) == SPELLED
    assert encode(tokenizer, SPELLED) == ids, "the choice of one call is not that of the next"
    assert special_tokens_note(tokenizer, SPELLED) == (
        "the text spells 600 special tokens, read as such: </s> (400), <s> (200)"
    )
    assert special_tokens_note(tokenizer, "plain < s > text") is None


def test_in_a_chat_only_the_users_words_may_be_text(pocket):
    tokenizer = copy.deepcopy(pocket[2])
    tokenizer.chat_template = "<s>user: {{ messages[0].content | trim }}</s>bot:"
    ids = encode(tokenizer, " stop </s> here ", chat=True, special="text")
    assert ids.count(0) == 1 and ids.count(1) == 1 and ids[0] == 0
    assert tokenizer.decode(ids) == "<s>user: stop </s> here</s>bot:"
    assert encode(tokenizer, "hi", chat=True, special="text") == encode(tokenizer, "hi", chat=True)
    tokenizer.chat_template = "<s>{{ messages[0].content | upper }}"
    with pytest.raises(UserError, match="--special-tokens text: the chat template changes"):
        encode(tokenizer, "a </s>", chat=True, special="text")


def test_no_training_document_is_cut_by_its_own_text(tmp_path, pocket):
    """An EOS in a stream, window or passage is the end of a document, and stands there once."""
    tokenizer, names = pocket[2], [f"t{i}" for i in range(30)]
    (tmp_path / "texts").mkdir()
    for name in names:
        (tmp_path / "texts" / f"{name}.txt").write_text(f"{name} {SPELLED}")
    source = str(tmp_path / "texts")
    trained = [d for d in documents(source) if not d.held_out]
    assert 0 < len(trained) < 30
    windows = TrainingDocuments([source]).windows(tokenizer, 64, 0)
    flat = [i for window in windows for i in window.ids]
    assert 0 not in flat and len(trained) - 1 <= flat.count(1) <= len(trained)
    for found in (held_out_prompts(tokenizer, [source], 500, 3), held_out_windows(tokenizer, [source], 500, 3, False)):
        ids = [found[0][1] if isinstance(found[0], tuple) else found[0]][0]
        assert not {0, 1} & set(ids)


def test_no_pretraining_stream_is_cut_by_its_text(tmp_path, pocket):
    (tmp_path / "texts").mkdir()
    for i in range(30):
        (tmp_path / "texts" / f"t{i}.txt").write_text(f"{i} {SPELLED}")
    stream = _stream(pocket[2], str(tmp_path / "texts"), 10**9, 0, Unread(), SILENT).tolist()
    assert 0 not in stream and stream.count(1) == sum(not d.held_out for d in documents(str(tmp_path / "texts")))


def test_samples_follow_the_same_choice(tmp_path, pocket):
    path = tmp_path / "book.txt"
    path.write_text(SPELLED * 3)
    parsed, literal = (load_samples(pocket[2], "book", [str(path)], 2, 400, special=s) for s in ("parse", "text"))
    assert 1 in parsed[0].prompt(400) and 1 not in literal[0].prompt(400)
    assert "</s> (1200)" in parsed[0].note and literal[0].note is None


# -- long texts


@pytest.mark.parametrize("name", LINES)
def test_a_very_long_line_is_read_or_refused_in_seconds(name, pocket):
    tokenizer, text, start = pocket[2], LINES[name], time.process_time()
    with pytest.raises(UserError, match="exceed the model's 16896"):
        fit(encode(tokenizer, shorten(tokenizer, text, 16896, 100, None)), 16896, 100, None)
    ids = fit(encode(tokenizer, shorten(tokenizer, text, 16896, 100, "middle")), 16896, 100, "middle")
    assert len(ids) == 16796
    assert time.process_time() - start < 60


def test_a_text_longer_than_all_tokens_is_refused_or_cut_before_it_is_encoded(pocket, monkeypatch):
    monkeypatch.setattr(prompts, "ENCODED_CHARACTERS", 1000)
    tokenizer = pocket[2]
    longest = max(map(len, tokenizer.get_vocab()))
    text = "".join(random.Random(3).choices(["word ", "the ", "line\n", "déjà ", "(x) "], k=40_000))
    space = len(text) // (2 * longest)
    for new in (0, 30):
        got = fit(encode(tokenizer, shorten(tokenizer, text, space + new, new, "middle")), space + new, new, "middle")
        assert got == fit(encode(tokenizer, text), space + new, new, "middle")
    assert len(shorten(tokenizer, text, space, 0, "middle")) == space * longest
    assert shorten(tokenizer, text, len(text) // longest + 1, 0, None) is text
    start = time.process_time()
    with pytest.raises(UserError, match=rf"{50 * 10**6} characters of prompt \+ 20 new tokens exceed the model's 900"):
        shorten(tokenizer, "x" * (50 * 10**6), 900, 20, None)
    assert time.process_time() - start < 5


def test_long_documents_are_encoded_in_pieces(pocket, monkeypatch):
    tokenizer = pocket[2]
    text = "".join(random.Random(4).choices(["word ", "the ", "line\n", "déjà ", "x = 1\n    "], k=4000)) + "end"
    whole = encode(tokenizer, text, special="text")
    monkeypatch.setattr(prompts, "PIECE_CHARACTERS", 500)
    cut = pieces(text)
    assert "".join(cut) == text and max(map(len, cut)) <= 500 and all(p.endswith("\n") for p in cut[:-1])
    ids = encode_document(tokenizer, text)
    assert tokenizer.decode(ids) == text and abs(len(ids) - len(whole)) <= len(cut)
    assert "".join(pieces("a" * 1300)) == "a" * 1300 and pieces("") == [""]


def test_a_prompt_is_cut_from_one_long_line(pocket):
    for name, tokens in (("letters", 500), ("base64", 500), ("digits", 333), ("han", 300)):
        piece = cut_prompt(pocket[2], LINES[name], tokens)
        assert len(encode(pocket[2], piece)) == tokens
