"""Documents of named sources: files, folders, tars, and data sets of the hub."""

import json
import tarfile
import zipfile

import pytest
from datasets import Dataset

from bdcli.base.errors import UserError
from bdcli.data.document import Unread
from bdcli.data.samples import load_samples
from bdcli.data.sources import documents, missing_sources, split_source
from bdcli.data.split import TrainingDocuments, held_out_prompts
from tests.support.training import write_texts

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
    assert TrainingDocuments(["lwm"]).accounts[0] == 3


def test_what_the_hub_does_not_hand_out_is_named(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError

    monkeypatch.setattr("datasets.load_dataset", offline)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    problems = list(missing_sources(["pg19", "longbench/qmsum", "lwm=nowhere.jsonl"]))
    assert len(problems) == 3 and "emozilla/pg19 is not here" in problems[0]
    assert "longbench/qmsum=FILE.jsonl" in problems[1] and "nowhere.jsonl does not exist" in problems[2]


def test_parquet_files_are_read(tmp_path):

    Dataset.from_list([{"context": q["context"], "input": q["input"]} for q in QUESTIONS]).to_parquet(
        str(tmp_path / "q.parquet")
    )
    found = list(documents(str(tmp_path)))
    assert [(d.text, d.question) for d in found] == [(q["context"], f"\n\n{q['input']}") for q in QUESTIONS]


def test_sources_from_files(tmp_path, pocket):
    (tmp_path / "a.txt").write_text("word " * 4000, "utf-8")
    rows = [{"text": f"row {i} " * 900} for i in range(40)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    docs = list(documents(str(tmp_path)))
    assert len(docs) == 41 and 0 < sum(d.held_out for d in docs) < 12
    prompts = held_out_prompts(pocket[2], [str(tmp_path / "b.jsonl")], 200, 3)
    assert [len(ids) for _, ids in prompts] == [200] * 3 and prompts[0][0] == "b"
    for bad in ("nowhere.txt", str(tmp_path / "empty")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError):
            list(documents(bad))
    (tmp_path / "c.jsonl").write_text('{"words": 3}\n', "utf-8")
    with pytest.raises(UserError, match=r"c.jsonl:1 has none of the fields"):
        list(documents(str(tmp_path / "c.jsonl")))


def test_tars_of_texts_are_read_and_broken_ones_named(tmp_path):
    text = write_texts(tmp_path / "texts")
    with tarfile.open(tmp_path / "books.tar.xz", "w:xz") as archive:
        for path in sorted(text.iterdir()):
            archive.add(path, path.name)
    names = {d.name for d in documents(str(tmp_path / "books.tar.xz"))}
    assert names == {p.stem for p in text.iterdir()}
    torn = tmp_path / "torn.tar.xz"
    torn.write_bytes((tmp_path / "books.tar.xz").read_bytes()[:500])
    with pytest.raises(UserError, match=r"torn\.tar\.xz cannot be read"):
        list(documents(str(torn)))
    (tmp_path / "x.pdf").write_bytes(b"%PDF")
    with pytest.raises(UserError, match="of no kind"):
        list(documents(str(tmp_path / "x.pdf")))


def test_documents_are_read_as_prompts_are(tmp_path):
    """A mark is dropped, line ends stay, and what is not UTF-8 is named with the command that converts it."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert [d.text for d in documents(str(tmp_path))] == ["one\r\ntwo\n"]
    for name, encoding in (("b", "utf-16"), ("c", "utf-32"), ("d", "latin1")):
        (tmp_path / f"{name}.txt").write_bytes("Zoë and others\n".encode(encoding))
        with pytest.raises(UserError, match=f"{name}.txt is .*not UTF-8.*iconv -f {encoding}"):
            list(documents(str(tmp_path / f"{name}.txt")))
    unread = Unread()
    assert len(list(documents(str(tmp_path), unread))) == 1 and unread.failed == 3
    with tarfile.open(tmp_path / "e.tar", "w") as archive:
        for name in "ab":
            archive.add(tmp_path / f"{name}.txt", f"{name}.txt")
    unread = Unread()
    assert [d.text for d in documents(str(tmp_path / "e.tar"), unread)] == ["one\r\ntwo\n"]
    assert unread.failed == 1 and "b.txt is UTF-16" in unread.failures[0]
