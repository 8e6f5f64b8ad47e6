"""Text that arrives in pieces equals the text decoded at once, whatever the tokenizer, in linear time."""

import random
import time

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bdcli.model.text import TextStream

WORDS = ["▁", "▁▁", "▁the", "the", "▁a", ".", "é", "語", "▁語", "\n", "�", "▁�"]
LLAMA_2 = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
DECODERS = {
    "llama 2": decoders.Sequence(LLAMA_2),
    "gemma": decoders.Sequence(LLAMA_2[:3]),
    "metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "no bytes": decoders.Metaspace(),
}


def sentence_pieces(name):
    """A tokenizer of words, spaces as ▁ and bytes; ids 0 to 2 are special, the last an added word."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *WORDS]
    vocab = {token: i for i, token in enumerate(names)}
    inner = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), DECODERS[name]
    wrapped = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    wrapped.add_tokens([AddedToken("<word>", special=False), AddedToken("<turn>", special=True)])
    return wrapped


def streamed(tokenizer, ids, rng):
    stream, text, i = TextStream(tokenizer), "", 0
    while i < len(ids):
        n = rng.choice((0, 1, 1, 1, 2, 3, 7))
        text += stream.feed(ids[i : i + n])
        i += n
    return text + stream.feed([], end=True)


@pytest.fixture(params=[*DECODERS, "pocket"])
def tokenizer(request):
    return request.getfixturevalue("pocket")[2] if request.param == "pocket" else sentence_pieces(request.param)


def test_pieces_are_the_whole(tokenizer):
    rng = random.Random()
    size = len(tokenizer)
    some = tokenizer("naïve 語 😀 the\n  é", add_special_tokens=False)["input_ids"]
    for _ in range(300):
        pool = rng.choice([range(size + 3), range(min(size, 270)), some, [0, 1, 2, size, *some], range(230, size)])
        ids = [rng.choice(pool) for _ in range(rng.randrange(25))]
        assert streamed(tokenizer, ids, rng) == tokenizer.decode(ids, skip_special_tokens=True), ids


def test_a_skipped_token_does_not_take_the_next_ones_space():
    tokenizer = sentence_pieces("llama 2")
    the = tokenizer.convert_tokens_to_ids("▁the")
    for skipped in (0, 2, len(tokenizer) - 1, len(tokenizer) + 5):
        stream = TextStream(tokenizer)
        assert "".join(stream.feed([i]) for i in (the, skipped, the)) == "the the"


def test_a_character_is_shown_when_it_is_complete(pocket):
    for tokenizer in (sentence_pieces("llama 2"), pocket[2]):
        emoji = tokenizer("a😀", add_special_tokens=False)["input_ids"]
        stream = TextStream(tokenizer)
        assert "�" not in "".join(stream.feed([i]) for i in emoji)
        stream = TextStream(tokenizer)  # and the text may end inside it
        cut = "".join(stream.feed([i]) for i in emoji[:-1]) + stream.feed([], end=True)
        assert cut == tokenizer.decode(emoji[:-1]) and cut.endswith("�")


def test_time_is_linear_in_bad_bytes(tokenizer):
    """Twice the bytes take about twice the time, and text of random ids does not wait for its end."""

    def seconds(ids):
        stream, start = TextStream(tokenizer), time.process_time()
        text = "".join(stream.feed([i]) for i in ids) + stream.feed([], end=True)
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
        return time.process_time() - start

    known = tokenizer.get_vocab()
    bad = known.get("<0xFF>", known.get("ÿ", known.get("á")))
    short, long = (min(seconds([bad] * n) for _ in range(3)) for n in (1000, 8000))
    assert long < 24 * short
    rng = random.Random(0)
    short, long = (
        min(seconds([rng.randrange(len(tokenizer)) for _ in range(n)]) for _ in range(3)) for n in (250, 2000)
    )
    assert long < 24 * short


def test_only_an_unfinished_character_is_kept_back(pocket):
    known = pocket[2].get_vocab()
    stream = TextStream(pocket[2])
    shown = [stream.feed([known["ÿ"]]) for _ in range(50)]
    assert len("".join(shown)) >= 49
