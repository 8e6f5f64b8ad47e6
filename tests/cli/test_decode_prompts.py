"""`bdcli decode`: prompts of other editors, what they spell, their size; sampling settings and where they come from."""

import json
import shutil
import time

import pytest

from bdcli.model.hub import POCKET
from bdcli.results.store import Store
from tests.support.cli import compiled_only

SHORT = ["--max-new-tokens", 6, "--baseline", "off", "--json"]


def model(tmp_path, files):
    """A copy of the pocket target with `files`, and the flag that names it."""
    folder = tmp_path / "target"
    shutil.copytree(POCKET / "target", folder)
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return ["--target", folder]


def line(done, message, code=2):
    assert done.code == code and done.out == "" and done.err.count("\n") == 1, done
    assert message in done.err, done.err


def test_the_text_of_other_editors(cli, tmp_path, prompt):
    data = prompt.read_bytes()
    plain = cli("decode", "-", *SHORT, stdin=data).json
    assert cli("decode", "-", *SHORT, stdin=b"\xef\xbb\xbf" + data).json["tokens"] == plain["tokens"]
    path = tmp_path / "windows.txt"
    path.write_bytes(data.decode().encode("utf-16"))
    line(cli("decode", path), f"UTF-16, not UTF-8. Convert it: iconv -f utf-16 -t utf-8 {path}")
    line(cli("prompt", "--ctx", 64, "--source", path), "iconv -f utf-16")
    line(cli("bench", "--prompts", path, "--ctx", 64, "--budgets", 64, "--quick"), "iconv -f utf-16")
    piped = cli("decode", "-", stdin=path.read_bytes())
    line(piped, "standard input is UTF-16")
    assert "iconv" not in piped.err
    line(cli("decode", "-", stdin=b"\xef\xbb\xbf"), "is empty")


def test_special_tokens_that_a_prompt_spells_are_a_note(cli):
    text = b"one </s> two </s> three <s> four"
    done = cli("decode", "-", *SHORT, stdin=text)
    assert done.code == 0 and done.err.count("\n") == 1
    assert "spells 3 special tokens, read as such: </s> (2), <s> (1); --special-tokens text reads" in done.err
    literal = cli("decode", "-", *SHORT, "--special-tokens", "text", stdin=text)
    assert literal.err == "" and literal.json["context"] > done.json["context"]
    assert Store().runs()[0].config["special_tokens"] == "text"
    line(cli("decode", "-", "--special-tokens", "maybe", stdin=text), "'maybe' is not one of")


@pytest.mark.parametrize(
    "files", [{"chat_template.jinja": "{{ raise_exception('no') }}"}, {"chat_template.jinja": "{%"}]
)
def test_a_chat_template_that_raises_is_bad_input(cli, tmp_path, prompt, files):
    line(cli("decode", prompt, "--chat", *model(tmp_path, files)), f"the chat template of {tmp_path / 'target'} fails")
    assert not Store().runs()


def test_a_prompt_far_too_large_is_refused_before_it_is_encoded(cli, tmp_path):
    path = tmp_path / "huge.txt"
    path.write_bytes(b"some words and more\n" * 2_500_000)
    start = time.process_time()
    line(cli("decode", path), "50000000 characters of prompt + 256 new tokens exceed the model's 16896 positions")
    assert time.process_time() - start < 20


SIZES = {
    "budget": (["--budget", 10**7], None),
    "gamma": (["--gamma", 10**8], None),
    "both, chunks": (["--gamma", 10**5, "--budget", 10**9, "--select", "chunk"], None),
    "400 digits": (["--gamma", 10**400, "--budget", 10**400, "--select", "chunk"], None),
    "one new token": (["--gamma", 9, "--max-new-tokens", 1], None),
    "top-k": (["--temperature", 1, "--top-k", 10**6], None),
    "top-k beyond the store": (["--temperature", 1, "--top-k", 10**23], "--top-k 1"),
    "new tokens": (["--max-new-tokens", 10**9], "exceed the model's 16896"),
    "new tokens beyond the store": (["--max-new-tokens", 10**23], "--max-new-tokens 1"),
    "seed": (["--seed", 10**23], "--seed 1"),
    "min-p": (["--min-p", 1.5], "--min-p 1.5: must lie in 0 (off) .. 1"),
    "repetition penalty": (["--repetition-penalty", 0], "--repetition-penalty 0.0: must lie in"),
    "not a number": (["--temperature", "nan"], "--temperature nan"),
    "check of samples": (
        ["--check", "--temperature", 1],
        "--check compares greedy text, and --temperature 1.0 samples",
    ),
}


@pytest.mark.parametrize("case", SIZES)
def test_numbers_far_beyond_the_run_are_fitted_or_refused(case, cli, prompt):
    flags, message = SIZES[case]
    done = cli("decode", prompt, *SHORT, *flags)
    if message is None:
        assert done.code == 0 and len(done.json["tokens"]) in (1, 6) and done.json["drafter_kv_bytes"] < 20e6
    else:
        line(done, message)


@pytest.mark.parametrize("engine", ["torch", pytest.param("compiled", marks=compiled_only)])
def test_nearly_zero_temperatures_write_the_greedy_text(engine, cli, prompt):
    same = ["decode", prompt, *SHORT, "--engine", engine, "--gamma", 3, "--dtype", "float32"]
    greedy = cli(*same).json["tokens"]
    for flags in (["--temperature", 1e-46, "--top-k", 10**6], ["--temperature", 1, "--top-p", 1e-46]):
        assert cli(*same, *flags).json["tokens"] == greedy


def test_sampling_settings_are_stored_and_reported(cli, prompt):
    flags = ["--temperature", 0.8, "--min-p", 0.1, "--repetition-penalty", 1.2]
    done = cli("decode", prompt, *SHORT, *flags).json
    run = Store().runs()[0]
    for row in (done, run.model_dump(), run.config, cli("report", "--format", "json").json["runs"][0]):
        assert (row["temperature"], row["min_p"], row["repetition_penalty"]) == (0.8, 0.1, 1.2)


def test_greedy_text_with_a_penalty_is_checked_and_that_of_transformers(cli, prompt):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    flags = ["--max-new-tokens", 24, "--repetition-penalty", 1.3, "--dtype", "float32", "--json", "--check"]
    ours = cli("decode", prompt, *flags).json
    peer = AutoModelForCausalLM.from_pretrained(POCKET / "target", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(POCKET / "target")(prompt.read_text(), return_tensors="pt")["input_ids"]
    out = peer.generate(ids, do_sample=False, max_new_tokens=24, repetition_penalty=1.3, pad_token_id=0)
    assert ours["output_equal"] is True and ours["accepted"] > 0
    assert ours["tokens"] == out[0, ids.shape[1] :].tolist()


CONFIGS = {
    "sampling": (
        {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1},
    ),
    "no do_sample": ({"temperature": 0.7}, {"temperature": 0.7}),
    "only do_sample": ({"do_sample": True}, {"temperature": 1.0}),
    "greedy": ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0, "top_p": 1.0}),
    "penalty alone": ({"repetition_penalty": 1.2}, {"temperature": 0.0, "repetition_penalty": 1.2}),
    "nothing": ({"eos_token_id": 1, "top_k": None}, {"temperature": 0.0, "top_k": 0}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_the_models_own_settings_are_used_when_asked_for(case, cli, tmp_path, prompt):
    given, wanted = CONFIGS[case]
    flags = model(tmp_path, {"generation_config.json": given})
    assert cli("decode", prompt, *SHORT, *flags).json["temperature"] == 0.0
    done = cli("decode", prompt, *SHORT, *flags, "--generation-config")
    assert {name: done.json[name] for name in wanted} == wanted
    assert "from generation_config.json: " in done.err and done.err.count("\n") == 1


def test_a_flag_wins_over_the_models_own_settings(cli, tmp_path, prompt):
    flags = model(tmp_path, {"generation_config.json": {"do_sample": True, "temperature": 0.6, "top_p": 0.9}})
    done = cli("decode", prompt, *SHORT, *flags, "--generation-config", "--temperature", 0, "--check").json
    assert done["temperature"] == 0.0 and done["top_p"] == 0.9 and done["output_equal"] is True
    line(cli("decode", prompt, *flags, "--generation-config", "--check"), "--check compares greedy text")


def test_a_generation_config_that_is_wrong_or_missing_is_named(cli, tmp_path, prompt):
    flags = model(tmp_path, {"generation_config.json": {"do_sample": True, "temperature": "warm"}})
    line(cli("decode", prompt, *flags, "--generation-config"), "temperature is 'warm', not a number")
    (tmp_path / "target" / "generation_config.json").unlink()
    line(cli("decode", prompt, *flags, "--generation-config"), "holds no generation_config.json")
