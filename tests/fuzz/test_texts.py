"""Text to ids and back: all of Unicode, in pieces of any size."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bdcli.data.prompts import encode
from bdcli.model.text import TextStream
from tests.support.fuzz import fuzz

TEXTS = st.text() | st.text("ab \n\t\u2028\u0301\u200d\N{GRINNING FACE}\N{CJK UNIFIED IDEOGRAPH-4E00}é", min_size=1)
LONG = st.tuples(st.text(min_size=1, max_size=3), st.integers(1, 20_000)).map(lambda pair: pair[0] * pair[1])


@fuzz(200)
@given(TEXTS)
@example("\0\x7f\x85\u2028\ufeff\ufffd\U0010ffff")
def test_any_text_is_what_its_ids_decode_to(tokenizer, text):
    ids = encode(tokenizer, text)
    assert all(0 <= i < len(tokenizer) for i in ids)
    if not any(token in text for token in tokenizer.all_special_tokens):
        assert tokenizer.decode(ids) == text


@fuzz(10)
@given(LONG)
def test_a_long_line_is_what_its_ids_decode_to(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text)) == text


@st.composite
def pieces(draw, ids):
    """`ids` cut anywhere, with empty pieces."""
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)])]


def streamed(tokenizer, parts):
    stream = TextStream(tokenizer)
    return "".join([*map(stream.feed, parts), stream.feed([], end=True)])


@fuzz(200)
@given(st.data())
def test_a_stream_in_pieces_is_the_whole(tokenizer, data):
    """Of text, and of any ids, which are mostly no UTF-8."""
    anything = st.lists(st.integers(0, len(tokenizer) - 1), max_size=30)
    ids = data.draw(TEXTS.map(lambda text: encode(tokenizer, text)) | anything)
    assert streamed(tokenizer, data.draw(pieces(ids))) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def tokenizer(pocket):
    return pocket[2]
