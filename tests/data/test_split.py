"""Training text never holds measured text; windows and prompts are cut from documents."""

import itertools
import json
import re

import pytest

from bdcli.base.errors import UserError
from bdcli.data.document import is_held_out
from bdcli.data.prompts import HELD_OUT
from bdcli.data.sources import documents
from bdcli.data.split import TrainingDocuments, held_out_prompts, held_out_windows, missing_held_out
from tests.support.training import Notes, write_texts


def test_training_text_never_holds_measured_text(pocket):
    tokenizer = pocket[2]
    names = {d.name for d in documents("stdlib") if not d.held_out}
    assert len(names) > 100 and not names & {*HELD_OUT, "held out"}
    source = TrainingDocuments(["stdlib"])
    windows = list(itertools.islice(source.windows(tokenizer, 512, seed=3), 5))
    assert [len(w.ids) for w in windows] == [512] * 5 and not any(w.question for w in windows)
    assert windows[0] != next(source.windows(tokenizer, 512, seed=4))
    read, kept, dropped, failed = source.accounts
    assert read == kept + sum(dropped.values()) + failed and dropped["held out"] == 1


def test_files_that_are_not_text_are_counted(tmp_path):
    (tmp_path / "good.txt").write_text("word " * 50)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    read, kept, dropped, failed = TrainingDocuments([str(tmp_path)]).accounts
    assert (read, failed) == (3, 1) and read == kept + sum(dropped.values()) + failed
    assert len(list(documents(str(tmp_path)))) == 2


def names_drawn(held_out, count):
    """File names of documents that are, or are not, held out."""
    return [name for name in (f"book{i}" for i in range(500)) if is_held_out(name) == held_out][:count]


def write_books(folder, names, words=400):
    folder.mkdir()
    for name in names:
        (folder / f"{name}.txt").write_text(f"{name} " * words)
    return str(folder)


@pytest.mark.parametrize("count", [1, 3])
def test_that_no_document_was_drawn_for_measuring_is_said_as_such(count, tmp_path, pocket):
    books = write_books(tmp_path / "b", names_drawn(False, count))
    for make, section in ((held_out_prompts, "evaluation"), (held_out_windows, "held_out")):
        with pytest.raises(UserError) as found:
            make(pocket[2], [books], 64, 2, False)
        assert f"none of the {count} documents of {books} was drawn for measuring" in str(found.value)
        assert f"{section}.sources" in str(found.value) and "contexts" not in str(found.value)
        assert make(pocket[2], [books], 64, 2, True)
    assert list(missing_held_out([books])) == [f"none of the {count} documents of {books} was drawn for measuring"]
    drawn = write_books(tmp_path / "c", names_drawn(True, 1))
    assert list(missing_held_out([books, drawn])) == [] == list(missing_held_out(["stdlib"]))
    with pytest.raises(UserError, match=r"has 99999 tokens \(1 shorter\)\. Lower evaluation\.contexts"):
        held_out_prompts(pocket[2], [books, drawn], 99_999, 2)


def test_a_source_that_is_not_measured_beside_others_is_noted(tmp_path, pocket):
    books, drawn = write_books(tmp_path / "b", names_drawn(False, 2)), write_books(tmp_path / "c", names_drawn(True, 2))
    notes = Notes()
    assert len(held_out_prompts(pocket[2], [books, drawn], 64, 4, progress=notes)) == 2
    assert notes.lines == [f"none of the 2 documents of {books} was drawn for measuring"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of small texts."""
    return write_texts(tmp_path_factory.mktemp("texts"))


def test_measured_windows_come_from_held_out_documents_only(text, pocket):
    held = {d.name for d in documents(str(text)) if d.held_out}
    bodies = {d.name: pocket[2](d.text)["input_ids"] for d in documents(str(text))}
    try:
        found = held_out_windows(pocket[2], [str(text)], 512, 20, everything=False)
    except UserError:
        found = []
    inside = [{n for n, ids in bodies.items() if w[:40] == ids[(len(ids) - 512) // 2 :][:40]} for w in found]
    assert all(names <= held for names in inside) and len(found) == len(held)
    assert len(held_out_windows(pocket[2], [str(text)], 512, 20, everything=True)) == len(bodies)


QUESTIONS = [{"context": f"meeting {i} said things. " * 400, "input": f"Who spoke {i}?"} for i in range(12)]


def test_questions_end_a_prompt_and_are_never_answered_by_the_corpus(tmp_path, pocket):
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    decode, source = pocket[2].decode, TrainingDocuments([str(tmp_path / "q.jsonl")])
    candidates = list(source.windows(pocket[2], 300, seed=1, answer=40))
    asked = [c for c in candidates if c.question]
    assert len(asked) == source.accounts[1] and all(len(c.ids) == 260 for c in asked)
    assert len({re.search(r"Who spoke (\d+)\?$", decode(c.ids))[1] for c in asked}) == len(asked)
    assert [c.ids for c in candidates if not c.question] == [c.ids for c in source.windows(pocket[2], 300, seed=1)]
    prompts = held_out_prompts(pocket[2], [f"qmsum={tmp_path / 'q.jsonl'}"], 200, 20, everything=True)
    assert len(prompts) == 12 and all(name == "qmsum" and decode(ids)[-1] == "?" for name, ids in prompts)
