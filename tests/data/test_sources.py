"""Preparing: data sets by name, questions that the target answers, texts written together as they would be alone."""

import json
import random
import re
import zipfile

import pytest
import torch

from bdcli.backends.select import pick_backend, torch_backend
from bdcli.base.errors import UserError
from bdcli.cache.budget import BudgetCache
from bdcli.cache.full import FullCache
from bdcli.cache.official import OfficialCache
from bdcli.cache.view import plan_view
from bdcli.data.samples import load_samples
from bdcli.data.sources import Documents, documents, held_out_prompts, missing_sources, split_source
from bdcli.decode.session import Pair
from bdcli.train.distill.writer import Writer
from tests.support.models import tiny_model

QUESTIONS = [{"context": f"meeting {i} said things. " * 400, "input": f"Who spoke {i}?"} for i in range(12)]


@pytest.fixture
def longbench(tmp_path, monkeypatch):
    """LongBench's data.zip as the hub would hand it out."""
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for task in ("qmsum", "lcc"):
            archive.writestr(f"data/{task}.jsonl", "\n".join(map(json.dumps, QUESTIONS)))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "data.zip"))


@pytest.mark.usefixtures("longbench")
def test_longbench_by_name_by_task_and_from_a_file(tmp_path, pocket):
    found = list(documents("longbench/qmsum"))
    assert [d.text for d in found] == [q["context"] for q in QUESTIONS]
    assert found[3].question == "\n\nWho spoke 3?" and found[3].name == "longbench/qmsum:4"
    assert len(list(documents("longbench"))) == 24
    with pytest.raises(UserError, match="no task qmsun"):
        list(documents("longbench/qmsun"))
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    local = list(documents(f"longbench/qmsum={tmp_path / 'q.jsonl'}"))
    assert [d.question for d in local] == [d.question for d in found]
    assert split_source(f"longbench/qmsum={tmp_path / 'q.jsonl'}") == ("longbench/qmsum", str(tmp_path / "q.jsonl"))
    assert [split_source(s)[0] for s in ("pg19", "longbench", "a/b/books", "a/b.tar.xz", "x=a/b", "stdlib")] == [
        "pg19",
        "longbench",
        "books",
        "b",
        "x",
        "stdlib",
    ]
    sample = load_samples(pocket[2], "longbench/qmsum", ["longbench/qmsum"], 3, 200)[2]
    assert pocket[2].decode(sample.prompt(200)).endswith("Who spoke 2?")


def test_narrativeqa_is_lwm_with_an_instruction_and_each_document_once(monkeypatch):
    rows = [{"document": {"id": i // 3, "text": f"story {i // 3} " * 20}, "question": {"text": "?"}} for i in range(9)]
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda name, **_: asked.append(name) or iter(rows))
    found = list(documents("lwm"))
    assert asked == ["deepmind/narrativeqa"] and len(found) == 3
    assert all(d.question == "\n\nSummary of the text above:" for d in found)
    assert len(list(documents("lwm", enough=1))) == 1, "no more is read from the hub than is wanted"
    assert [d.text for d in documents("pg19")] == [d.text for d in found] and asked[-1] == "emozilla/pg19"
    assert Documents(["lwm"]).accounts[0] == 3


def test_what_the_hub_does_not_hand_out_is_named(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError

    monkeypatch.setattr("datasets.load_dataset", offline)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    problems = list(missing_sources(["pg19", "longbench/qmsum", "lwm=nowhere.jsonl"]))
    assert len(problems) == 3 and "emozilla/pg19 is not here" in problems[0]
    assert "longbench/qmsum=FILE.jsonl" in problems[1] and "nowhere.jsonl does not exist" in problems[2]


def test_questions_end_a_prompt_and_are_never_answered_by_the_corpus(tmp_path, pocket):
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    decode, source = pocket[2].decode, Documents([str(tmp_path / "q.jsonl")])
    candidates = list(source.windows(pocket[2], 300, seed=1, answer=40))
    asked = [c for c in candidates if c.asked]
    assert len(asked) == source.accounts[1] and all(len(c.ids) == 260 for c in asked)
    assert len({re.search(r"Who spoke (\d+)\?$", decode(c.ids))[1] for c in asked}) == len(asked)
    assert [c.ids for c in candidates if not c.asked] == [c.ids for c in source.windows(pocket[2], 300, seed=1)]
    prompts = held_out_prompts(pocket[2], [f"qmsum={tmp_path / 'q.jsonl'}"], 200, 20, everything=True)
    assert len(prompts) == 12 and all(name == "qmsum" and decode(ids)[-1] == "?" for name, ids in prompts)


# -- texts written together


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_texts_forwarded_together_have_the_logits_of_each_alone(kv_heads):
    model, rng = tiny_model(kv_heads=kv_heads), random.Random(kv_heads)
    view = plan_view(40, "window", "rebased", 4, 100)
    makers = [
        lambda: FullCache(model, 200),
        lambda: BudgetCache(model, 200, view),
        lambda: OfficialCache(model, 200, 16),
        lambda: FullCache(model, 200),
    ]
    prompts = [rng.choices(range(41), k=size) for size in (90, 61, 33, 7)]
    texts = [rng.choices(range(41), k=size) for size in (3, 23, 1, 12)]  # longer than a budgeted cache takes at once
    rows = [1, 4, 1, 12]
    alone, together = [], [make() for make in makers]
    for make, cache, prompt, text, wanted in zip(makers, together, prompts, texts, rows):
        mine = make()
        model.prefill(prompt, mine)
        model.prefill(prompt, cache)
        alone.append(model.forward(text, mine, wanted))
    found = model.forward_together(texts, together, rows)
    for a, b, cache, prompt, text in zip(alone, found, together, prompts, texts):
        assert a.shape == b.shape and (a - b).abs().max() < 1e-4 * a.abs().max()
        assert cache.length == len(prompt) + len(text)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_is_written_together_is_what_is_written_alone(temperature, pocket, text_ids):
    target, drafter, tokenizer = pocket
    prompts = [text_ids[start : start + size] for start, size in ((0, 300), (5000, 60), (9000, 700), (800, 301))]
    seeds, written = [3, 1, 4, 1], {}
    for name, engine, together in (
        ("alone", torch_backend(), 1),
        ("together", torch_backend(), 3),
        ("compiled", pick_backend("auto", [target, drafter], print), 4),
    ):
        pair = Pair(target, drafter, tokenizer, frozenset({text_ids[40]}), ("", ""), engine)
        writer = Writer(pair, together)
        assert writer.together == (1 if engine.name == "compiled" else together)
        written[name] = writer.write(prompts, 40, temperature, seeds)
    assert written["alone"] == written["together"] and all(0 < len(text) <= 40 for text in written["alone"])
    if temperature == 0:  # compiled drafts draw from a generator of their own
        assert written["compiled"] == written["alone"]


def test_a_text_that_breaks_is_left_out_and_the_others_go_on(pocket, text_ids):
    target, drafter, tokenizer = pocket
    pair = Pair(target, drafter, tokenizer, frozenset(), ("", ""), torch_backend())
    prompts = [text_ids[:80], text_ids[100:180], text_ids[200:280]]
    whole = Writer(pair, 3).write(prompts, 12, 0.0, [0, 0, 0])
    broken, feed = set(), FullCache.plan

    def spoil(cache, start, rows):
        if start == 80 - 1 and not broken:
            broken.add(id(cache))
        if id(cache) in broken:
            cache.values.fill_(torch.nan)
        return feed(cache, start, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FullCache, "plan", spoil)
        assert Writer(pair, 3).write(prompts, 12, 0.0, [0, 0, 0]) == [None, *whole[1:]]


def test_parquet_files_are_read(tmp_path):
    from datasets import Dataset

    Dataset.from_list([{"context": q["context"], "input": q["input"]} for q in QUESTIONS]).to_parquet(
        str(tmp_path / "q.parquet")
    )
    found = list(documents(str(tmp_path)))
    assert [(d.text, d.question) for d in found] == [(q["context"], f"\n\n{q['input']}") for q in QUESTIONS]
