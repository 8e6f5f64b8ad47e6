"""`bdcli decode`: the JSON contract, the same text whatever the settings, one-line errors with their exit codes."""

import re
import shutil
from pathlib import Path

import pytest

from bdcli.base.errors import INTERRUPTED, READER_GONE, BdcliError, UserError
from bdcli.model.hub import POCKET
from bdcli.results.store import Store
from tests.support.cli import compiled_only
from tests.support.faults import (
    nan_weights,
    other_vocabulary,
    read_only_store,
    text_as_store,
    truncated,
    unknown_architecture,
    without_tokenizer,
)

ROOT = Path(__file__).parents[2]
CONTRACT = {
    "run_id",
    "target",
    "drafter",
    "device",
    "dtype",
    "context",
    "budget",
    "gamma",
    "select",
    "positions",
    "temperature",
    "seed",
    "tokens",
    "text",
    "finish_reason",
    "accepted",
    "drafted",
    "acceptance_rate",
    "mean_accepted_length",
    "ttft_s",
    "tokens_per_second",
    "ar_tokens_per_second",
    "speedup",
    "max_drafter_entries",
    "drafter_kv_bytes",
    "target_kv_bytes",
    "peak_memory_bytes",
    "loop_rate",
    "output_equal",
    "ties",
}


def test_decode_json_keeps_the_contract_and_the_store_agrees(cli, prompt):
    result = cli("decode", prompt, "--max-new-tokens", 20, "--budget", 128, "--gamma", 3, "--check", "--json").json
    assert set(result) >= CONTRACT
    assert (result["context"], result["budget"], result["gamma"], result["seed"]) == (300, 128, 3, 0)
    assert len(result["tokens"]) == 20 and result["finish_reason"] == "length" and result["text"]
    assert result["output_equal"] is True and result["ties"] == 0
    assert result["drafted"] > 0 and result["max_drafter_entries"] <= 128
    assert result["speedup"] == pytest.approx(result["tokens_per_second"] / result["ar_tokens_per_second"])
    row = cli("report", "--format", "json").json["runs"][0]
    shared = set(row) & set(result) - {"status"}
    assert len(shared) > 25 and {k: row[k] for k in shared} == {k: result[k] for k in shared}
    kept = Store().prompts(result["run_id"])[0]
    assert kept.tokens == result["tokens"] and kept.text == result["text"] and row["prompts"] == 1


def test_decode_prints_text_and_figures_on_stdout(cli, prompt):
    done = cli("decode", prompt, "--max-new-tokens", 16)
    assert done.code == 0 and done.err == ""
    for word in ("run ", "acceptance", "mean length", "AR", "tok/s", "speedup", "entries held"):
        assert word in done.out


def test_all_baselines_and_dtypes_write_the_same_text(cli, prompt):
    runs = [
        cli("decode", prompt, "--max-new-tokens", 16, "--json", *extra).json
        for extra in (["--baseline", "off"], ["--baseline", "sample"], ["--baseline", "full"], ["--budget", "full"])
    ]
    assert len({tuple(r["tokens"]) for r in runs}) == 1
    assert runs[0]["speedup"] is None and runs[0]["ar_tokens_per_second"] is None
    assert runs[1]["speedup"] > 0 and runs[2]["output_equal"] is True
    assert runs[3]["budget"] == "full" and runs[3]["positions"] == "absolute"


def test_bfloat16_is_checked_by_the_tie_rule(cli, prompt):
    same = ["decode", prompt, "--max-new-tokens", 48, "--dtype", "bfloat16", "--check", "--json"]
    result = cli(*same, "--engine", "torch").json
    assert result["output_equal"] is True and result["logit_error"] > 0 and result["ties"] < 5


@compiled_only
def test_compiled_steps_leave_nothing_to_tie(cli, prompt):
    result = cli("decode", prompt, "--max-new-tokens", 48, "--dtype", "bfloat16", "--check", "--json").json
    assert result["attention"] == "compiled" and result["drafted"] > 0
    assert result["output_equal"] is True and result["logit_error"] == 0 and result["ties"] == 0


def test_sampling_is_seeded_and_never_called_equal(cli, prompt):
    same = ["decode", prompt, "--max-new-tokens", 16, "--temperature", 1, "--top-p", 0.9, "--gamma", 3, "--json"]
    one, two, other = cli(*same).json, cli(*same).json, cli(*same, "--seed", 5).json
    assert one["tokens"] == two["tokens"] != other["tokens"]
    assert one["output_equal"] is None and one["ties"] is None


def test_stdin_stop_text_and_trim(cli, prompt):
    text = prompt.read_bytes()
    free = cli("decode", "-", "--max-new-tokens", 30, "--json", stdin=text).json
    assert free["context"] == 300
    word = free["text"][12:16]
    cut = cli("decode", "-", "--max-new-tokens", 30, "--stop", word, "--json", stdin=text).json
    assert cut["finish_reason"] == "stop" and cut["text"] == free["text"][: free["text"].index(word)]
    long = cli("decode", prompt, "--max-new-tokens", 16700, "--json")
    assert long.code == 2 and "300 prompt + 16700 new tokens exceed the model's 16896" in long.err
    assert "--trim middle" in long.err


BAD_OPTIONS = {
    "budget below the minimum": (["--budget", 8, "--gamma", 4], "budget 8 is too small: 4 sinks \\+ 4 draft"),
    "budget word": (["--budget", "lots"], "--budget lots"),
    "gamma 0": (["--gamma", 0], "--gamma 0: must be at least 1"),
    "gamma -1": (["--gamma", -1], "--gamma -1: must be at least 1"),
    "unknown selection": (["--select", "magic"], "'magic' is not one of"),
    "unknown dtype": (["--dtype", "int3"], "'int3' is not one of"),
    "unknown flag": (["--bugdet", 3], "No such option"),
    "temperature": (["--temperature", -1], "--temperature -1.0"),
    "top-p": (["--top-p", 0], "--top-p 0.0"),
    "device": (["--device", "quantum"], "--device quantum is not usable"),
    "a device without numbers": (["--device", "meta"], "--device meta is not usable"),
    "no such model": (["--target", "./nowhere"], "no such folder"),
    "other vocabulary": (other_vocabulary, "another vocabulary"),
    "truncated safetensors": (truncated, "model.safetensors is damaged or truncated"),
    "missing tokenizer": (without_tokenizer, "holds no tokenizer"),
    "unknown architecture": (unknown_architecture, "MambaForCausalLM is not supported. Supported: Llama"),
    "read-only store": (read_only_store, "is read-only"),
    "a store that is no store": (text_as_store, "is not a SQLite file"),
    "context": (["--max-new-tokens", 16800], "exceed the model's 16896"),
    "chat without template": (["--chat"], "no chat template"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_one_line_and_exit_2(case, cli, prompt, tmp_path):
    extra, message = BAD_OPTIONS[case]
    before = prompt.read_bytes()
    done = cli("decode", prompt, "--max-new-tokens", 8, *(extra(tmp_path) if callable(extra) else extra), "--json")
    one_line(done, message)
    assert prompt.read_bytes() == before


BAD_PROMPTS = {
    "no such file": (None, "does not exist"),
    "empty": (b"", "is empty"),
    "binary": (b"\x7fELF\0\0\1", "is a binary file"),
    "not UTF-8": ("Zoë".encode("latin1"), "is not UTF-8 \\(byte 2\\)"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_bad_prompts_are_one_line_and_exit_2(case, cli, tmp_path):
    data, message = BAD_PROMPTS[case]
    path = tmp_path / "prompt.txt"
    if data is not None:
        path.write_bytes(data)
    one_line(cli("decode", path), message)
    if data is not None:
        assert path.read_bytes() == data
        one_line(cli("decode", "-", stdin=data), message)
    assert not Store().runs()


def test_non_finite_logits_are_one_line_and_exit_1(cli, prompt, tmp_path):
    """They come up in the middle of a run, so it failed; the input was fit to start with."""
    done = cli("decode", prompt, "--max-new-tokens", 8, *nan_weights(tmp_path), "--json")
    one_line(done, "target produced non-finite logits", code=1)


def one_line(done, message, code=2):
    assert done.code == code, done
    assert done.out == "" and done.err.count("\n") == 1 and "Traceback" not in done.err, done
    assert re.search(message, done.err), done.err


def test_a_failed_run_is_stored_as_failed(cli, prompt, tmp_path):
    cli("decode", prompt, *nan_weights(tmp_path))
    run = Store().runs()[0]
    assert run.status == "failed" and "non-finite" in run.error


def test_an_unequal_text_makes_the_run_invalid(cli, prompt, monkeypatch):
    """An engine that accepts whatever is drafted is caught by --check."""
    from bdcli.speculation import speculator as speculate
    from bdcli.speculation.sampling import Verdict, best_tokens

    fraud = lambda draft, logits: Verdict([*draft, best_tokens(logits, "target")[-1]], len(draft))  # noqa: E731
    monkeypatch.setattr(speculate, "verify_greedy", fraud)
    done = cli("decode", prompt, "--max-new-tokens", 40, "--gamma", 4, "--check", "--json")
    assert done.code == 1 and done.json["output_equal"] is False and "invalid" in done.err
    assert Store().runs()[0].status == "failed"


def test_a_text_whose_row_cannot_be_written_is_shown(cli, prompt, monkeypatch):
    def full(*_args, **_fields):
        raise BdcliError("store /x.db cannot be used (database or disk is full)", "Use another: --db runs.db")

    monkeypatch.setattr(Store, "finish", full)
    done = cli("decode", prompt, "--max-new-tokens", 8, "--engine", "torch", "--json")
    assert done.code == 1 and len(done.json["tokens"]) == 8 and done.json["text"]
    assert done.err.count("\n") == 1 and "the result is not stored: store /x.db" in done.err
    done = cli("decode", prompt, "--max-new-tokens", 8, "--engine", "torch")
    assert done.code == 1 and "speedup" in done.out and "not stored" in done.err


@pytest.mark.parametrize("words", [["PROMPT"], ["plain.txt", "--target", "MODEL"]], ids=["prompt", "model"])
def test_names_that_are_bytes_run_and_are_stored_escaped(words, cli, prompt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt.rename("plain.txt")
    shutil.copy("plain.txt", "p\udcff.txt")
    shutil.copytree(POCKET / "target", "m\udcff")
    names = {"PROMPT": "p\udcff.txt", "MODEL": "m\udcff"}
    done = cli(
        "decode", *(names.get(word, word) for word in words), "--max-new-tokens", 4, "--engine", "torch", "--json"
    )
    assert done.code == 0, done.err
    run = Store().runs()[0]
    assert (
        run.status == "done" and r"\xff" in f"{run.dataset} {run.target}" and r"\xff" in str(run.config) + run.dataset
    )
    assert done.json["target"] == run.target and "\udcff" not in done.out


def test_exit_codes_are_those_of_the_table():
    table = dict(re.findall(r"^\| (\d+) \| ([^|]+) \|$", (ROOT / "docs" / "errors.md").read_text("utf-8"), re.M))
    codes = {BdcliError.exit_code, UserError.exit_code, INTERRUPTED, READER_GONE}
    assert {0, *codes} == set(map(int, table))
    assert "SIGHUP" in table[str(INTERRUPTED)] and "stdout" in table[str(READER_GONE)]
