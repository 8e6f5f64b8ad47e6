"""llama.cpp as a peer, by a stand-in for its server: requests, rounds, failures, absence, and what is left behind."""

import json
import os
import sys
from pathlib import Path

import psutil
import pytest

from bdcli.bench import external, llama_cpp
from bdcli.bench.external import Answer, ended
from bdcli.bench.llama_cpp import Token, blocks_of
from bdcli.bench.outcome import Block, rounds_of
from bdcli.bench.process import PeerError
from bdcli.results.store import Store
from tests.support import fake_llama_server
from tests.support.bench import SMALL, cells

NEW = 12


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder that has the stand-in as llama-server; its requests are recorded there."""
    program = tmp_path / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n" + Path(fake_llama_server.__file__).read_text("utf-8"))
    program.chmod(0o755)
    monkeypatch.setenv("BDCLI_LLAMA_CPP", str(program.parent))
    monkeypatch.setenv("FAKE_FOLDER", str(tmp_path))
    model = tmp_path / "model.gguf"
    model.touch()
    monkeypatch.setattr(llama_cpp, "gguf_file", lambda _name: model)
    return tmp_path


def started(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]


def test_a_sweep_measures_the_server_beside_ours_and_leaves_no_process(cli, server):
    found = cells(cli(*SMALL, "--methods", "llama-cpp,llama-cpp-ngram", "--gamma", "auto,5", "--json"))
    plain, drafted = found[200, "llama-cpp"], found[200, "llama-cpp-ngram"]
    assert {arm: cell["invalid_reason"] for (_, arm), cell in found.items()} == dict.fromkeys(
        ("ar", "llama-cpp", "llama-cpp-ngram", "llama-cpp-ngram-g5")
    )
    assert plain["tokens_per_second"] == pytest.approx(100)  # one token every 10 ms of the server's clock
    assert drafted["tokens_per_second"] == pytest.approx(275)  # 1 + 11 tokens, 11 of them in 4 rounds of 10 ms
    assert drafted["acceptance_rate"] == pytest.approx(7 / 16) and plain["acceptance_rate"] is None
    assert (plain["dtype"], plain["gamma"], drafted["gamma"]) == ("gguf", 0, "auto")
    assert plain["output_equal"] is False and plain["peak_memory_bytes"] is None
    row = next(run for run in Store().runs() if run.run_id == plain["run_id"])
    assert row.versions["llama.cpp"].startswith("7 (abc) ") and row.versions["torch"]
    assert "llama.cpp" not in next(run for run in Store().runs() if run.arm == "ar").versions
    assert len(started(server)) == 3 and not any(map(psutil.pid_exists, started(server)))


def test_the_server_gets_ids_settings_and_threads_of_the_sweep(cli, server):
    cells(cli(*SMALL, "--methods", "llama-cpp-ngram", "--gamma", 5, "--temperature", 0.5, "--seed", 3, "--json"))
    asked = [json.loads(path.read_text()) for path in server.glob("request-*")]
    texts = sorted((a for a in asked if a["n_predict"] == NEW), key=lambda a: a["seed"])
    assert [a["seed"] for a in texts] == [3, 4] and all(len(a["prompt"]) == 200 for a in texts)
    assert all(isinstance(token, int) for token in texts[0]["prompt"])
    assert (texts[0]["temperature"], texts[0]["top_k"], texts[0]["cache_prompt"]) == (0.5, 0, False)
    words = texts[0]["arguments"]
    for flag, value in (
        ("--threads", os.environ["OMP_NUM_THREADS"]),
        ("--spec-type", "ngram-simple"),
        ("--spec-ngram-simple-size-m", "5"),
        ("--flash-attn", "auto"),
        ("--cache-type-k", "f16"),
        ("--model", str(server / "model.gguf")),
    ):
        assert words[words.index(flag) + 1] == value


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("refuses", "llama-server: 500"),
        ("fails", "llama-server: decode failed"),
        ("dies", "llama-server ended with exit code 7: ggml: out of memory"),
        ("broken", "llama-server ended with exit code 1: error: unknown model architecture"),
        ("hangs", "llama-server did not answer within 2 s"),
        ("loading", "llama-server was not ready within 2 s"),
        ("old", "llama-server sends no 'timings'"),
        ("short", "the text ended after 6 of 12 tokens"),
    ],
)
def test_a_server_that_fails_makes_its_own_cell_invalid(cli, server, monkeypatch, mode, reason):
    monkeypatch.setenv("FAKE", mode)
    if mode in ("hangs", "loading"):
        monkeypatch.setattr(external, "PATIENCE_S", 2.0)
        monkeypatch.setattr(external, "LOAD_S", 2.0 if mode == "loading" else 60.0)
    found = cells(cli(*SMALL, "--methods", "llama-cpp,lookup", "--json"))
    assert not found[200, "llama-cpp"]["valid"] and reason in found[200, "llama-cpp"]["invalid_reason"], found
    assert found[200, "ar"]["valid"] and found[200, "lookup"]["valid"]
    assert len(started(server)) <= 1 and not any(map(psutil.pid_exists, started(server)))


def test_tokens_that_the_stream_leaves_out_come_from_a_whole_answer(cli, server, monkeypatch):
    monkeypatch.setenv("FAKE", "halves")
    cell = cells(cli(*SMALL, "--methods", "llama-cpp", "--json"))[200, "llama-cpp"]
    assert cell["invalid_reason"] is None and cell["tokens_per_second"] == pytest.approx(100)
    text = next(row for row in Store().prompts(cell["run_id"]))
    asked = [json.loads(path.read_text()) for path in server.glob("request-*")]
    assert text.tokens in [a["prompt"][:NEW][::-1] for a in asked] and [r[0] for r in text.rounds] == [1] * NEW


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("binary", "llama-cpp is left out: llama-server is neither on PATH nor named by BDCLI_LLAMA_CPP"),
        ("model", "llama-cpp is left out: llama.cpp reads GGUF files; pass the model's .gguf as --target"),
    ],
)
def test_an_absent_server_is_one_line_and_the_others_are_measured(cli, server, monkeypatch, setting, line):
    if setting == "binary":
        monkeypatch.setenv("BDCLI_LLAMA_CPP", str(server / "nowhere"))
        monkeypatch.setenv("PATH", str(server))
    else:
        monkeypatch.undo()
        monkeypatch.setenv("BDCLI_DB", str(server / "runs.db"))
        monkeypatch.setenv("BDCLI_LLAMA_CPP", str(server / "bin"))
    done = cli(*SMALL, "--methods", "llama-cpp,lookup", "--json")
    assert set(cells(done)) == {(200, "ar"), (200, "lookup")} and done.err.count("is left out") == 1
    assert line in done.err


def test_rounds_follow_the_clock_of_the_server():
    tokens = [Token(i, i, s, d) for i, s, d in ((1, 0.0, 0), (2, 0.1, 4), (3, 0.1, 4), (4, 0.3, 4), (5, 0.4, 8))]
    blocks = blocks_of(tokens, 5, 2.0)
    assert [(b.tokens, b.drafted) for b in blocks] == [(1, 0), (2, 4), (1, 0), (1, 4)]
    assert [b.at for b in blocks] == pytest.approx([2.0, 2.1, 2.3, 2.4])
    rounds = rounds_of(blocks)
    assert [r.seconds for r in rounds] == pytest.approx([0.1, 0.1, 0.2, 0.1])  # the first: mean of the others
    assert [r.accepted for r in rounds] == [0, 1, 0, 0]


def test_tokens_missing_from_a_plain_stream_are_rounds_of_one():
    blocks = blocks_of([Token(1, 1, 0.0, 0), Token(4, 4, 0.3, 0)], 6, 1.0)
    assert [(b.tokens, b.drafted) for b in blocks] == [(1, 0)] * 6
    assert [b.at for b in blocks] == pytest.approx([1.0, 1.06, 1.12, 1.18, 1.24, 1.3])


def test_a_text_ends_at_our_end_token_whatever_the_tool_takes_for_one():
    answer = Answer([5, 6, 1, 7, 8], [Block(1.0, 1, 0), Block(2.0, 3, 4), Block(3.0, 1, 0)])
    cut = ended(answer, frozenset({1}), 9)
    assert cut == Answer([5, 6, 1], [Block(1.0, 1, 0), Block(2.0, 2, 4)])
    assert ended(answer, frozenset({99}), 5) == answer
    with pytest.raises(PeerError, match="after 5 of 9 tokens with 8"):
        ended(answer, frozenset({99}), 9)
