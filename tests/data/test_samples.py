"""Prompts cut from documents: all contexts end alike, questions stay whole."""

import json

import pytest

from bdcli.base.errors import UserError
from bdcli.data.samples import load_samples


def test_every_context_of_a_sample_ends_at_the_same_token_inside_the_file(pocket, tmp_path):
    file = tmp_path / "book.txt"
    file.write_text(" ".join(f"word{i}" for i in range(900)), "utf-8")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    whole = tuple(pocket[2](file.read_text())["input_ids"])
    samples = load_samples(pocket[2], "d", [str(file), str(short)], 3, 600)
    ends = []
    for sample in samples:
        long, brief = sample.prompt(600), sample.prompt(100)
        assert len(long) == 600 and len(brief) == 100 and long[-100:] == brief
        ends.append(next(e for e in range(600, len(whole) + 1) if whole[e - 600 : e] == tuple(long)))
    assert ends == sorted(set(ends)) and ends[0] > 600 and ends[-1] < len(whole)
    with pytest.raises(UserError, match=r"no document of d .* has 6000 tokens; 2 are shorter"):
        load_samples(pocket[2], "d", [str(file), str(short)], 3, 6000)


def test_questions_are_never_cut_a_bos_is_kept_and_an_eos_is_not(pocket, tmp_path):
    class WithBos:
        """Puts a BOS in front and an EOS behind."""

        def __call__(self, text, **_):
            return {"input_ids": [0, *pocket[2](text)["input_ids"], 1]}

    file = tmp_path / "qa.jsonl"
    rows = [{"context": f"document {n} " * 200, "input": f"What is {n}?"} for n in range(3)]
    file.write_text("\n".join(map(json.dumps, rows)))
    samples = load_samples(WithBos(), "qa", [str(file)], 9, 300)
    assert len(samples) == 3  # each question once
    for n, sample in enumerate(samples):
        prompt = sample.prompt(120)
        assert prompt[0] == 0 and prompt.count(0) == 1 and len(prompt) == 120 and 1 not in prompt
        assert pocket[2].decode(prompt[1:]).endswith(f"document {n} \n\nWhat is {n}?")
