"""Prompts: cut to a length, trimmed, and put into a chat template."""

import copy

import pytest

from bdcli.base.errors import UserError
from bdcli.data.prompts import encode, fit


def test_chat_applies_the_tokenizers_own_template(pocket):
    tokenizer = copy.deepcopy(pocket[2])
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\nbot:{% endfor %}"
    assert tokenizer.decode(encode(tokenizer, " hi ", chat=True)) == "<s>user:  hi \nbot:"
    assert tokenizer.decode(encode(tokenizer, " hi ")) == " hi "


def test_trim_keeps_head_and_tail():
    ids = list(range(1000))
    kept = fit(ids, 100, 20, "middle")
    assert len(kept) == 80 and kept[:20] == ids[:20] and kept[20:] == ids[-60:]
    assert fit(ids[:80], 100, 20, None) == ids[:80]
    with pytest.raises(UserError, match="1000 prompt"):
        fit(ids, 100, 20, None)
