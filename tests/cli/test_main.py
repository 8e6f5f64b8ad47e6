"""The command line as users meet it: the contract's JSON, one-line errors with exit code 2, Ctrl-C, start-up cost."""

import copy
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bdcli.model.hub import POCKET
from bdcli.results.store import Store
from tests.support.cli import compiled_only

RECIPES = Path(__file__).parents[2] / "recipes"
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


@pytest.fixture
def prompt(tmp_path, cli):
    path = tmp_path / "prompt.txt"
    assert cli("prompt", "--ctx", "300", "--out", path).code == 0
    return path


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


def test_chat_applies_the_tokenizers_own_template(pocket):
    from bdcli.data.prompts import encode

    tokenizer = copy.deepcopy(pocket[2])
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\nbot:{% endfor %}"
    assert tokenizer.decode(encode(tokenizer, " hi ", chat=True)) == "<s>user:  hi \nbot:"
    assert tokenizer.decode(encode(tokenizer, " hi ")) == " hi "


def test_trim_keeps_head_and_tail():
    from bdcli.base.errors import UserError
    from bdcli.data.prompts import fit

    ids = list(range(1000))
    kept = fit(ids, 100, 20, "middle")
    assert len(kept) == 80 and kept[:20] == ids[:20] and kept[20:] == ids[-60:]
    assert fit(ids[:80], 100, 20, None) == ids[:80]
    with pytest.raises(UserError, match="1000 prompt"):
        fit(ids, 100, 20, None)


@pytest.mark.parametrize("ctx", ["1", "37", "1k", "4k", "16k"])
def test_prompt_has_exactly_that_many_tokens(cli, pocket, ctx):
    text = cli("prompt", "--ctx", ctx).out
    tokens = int(ctx[:-1]) * 1024 if ctx.endswith("k") else int(ctx)
    assert len(pocket[2](text, verbose=False)["input_ids"]) == tokens


def test_prompts_of_all_lengths_end_at_the_same_place(cli, tmp_path):
    short, long = cli("prompt", "--ctx", "512").out, cli("prompt", "--ctx", "2k").out
    assert long.endswith(short[20:]) and short.endswith("\n")
    own = tmp_path / "own.txt"
    own.write_text("".join(f"line {i} of a file of my own\n" for i in range(900)), "utf-8")
    assert "of my own" in cli("prompt", "--ctx", "256", "--source", own).out
    few = cli("prompt", "--ctx", "64k", "--source", own)
    assert few.code == 2 and "Lower --ctx" in few.err


def pocket_copy(tmp_path, role="drafter"):
    folder = tmp_path / f"broken-{role}"
    shutil.copytree(POCKET / role, folder)
    return folder


def truncated(tmp_path):
    folder = pocket_copy(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    return ["--drafter", folder]


def without_tokenizer(tmp_path):
    folder = pocket_copy(tmp_path, "target")
    (folder / "tokenizer.json").unlink()
    return ["--target", folder]


def other_vocabulary(tmp_path):
    folder = pocket_copy(tmp_path)
    raw = json.loads((folder / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    a, b = list(vocab)[1000], list(vocab)[1001]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return ["--drafter", folder]


def unknown_architecture(tmp_path):
    folder = pocket_copy(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    return ["--drafter", folder]


def nan_weights(tmp_path):
    folder = pocket_copy(tmp_path, "target")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return ["--target", folder]


def read_only_store(tmp_path):
    Store(str(tmp_path / "ro.db"))
    (tmp_path / "ro.db").chmod(0o444)
    return ["--db", tmp_path / "ro.db"]


def text_as_store(tmp_path):
    (tmp_path / "text.db").write_text("hello, I am a text file\n" * 40)
    return ["--db", tmp_path / "text.db"]


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


def test_doctor(cli):
    done = cli("doctor", "--json")
    assert done.code == 0 and all(check["ok"] for check in done.json.values())
    assert {"versions", "device", "dtype", "store", "pocket pair"} <= set(done.json)


# -- in processes of their own


def start(*args, **settings):
    """Unbuffered pipes: what one read leaves is there for the next. It heeds SIGINT, also where the tests ignore it."""
    words = [sys.executable, "-m", "bdcli", *map(str, args)]
    pipe, env = subprocess.PIPE, os.environ | {"OMP_NUM_THREADS": "1"}
    settings = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)} | settings
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, env=env, bufsize=0, **settings)


def test_ctrl_c_keeps_what_was_written_and_kill_leaves_a_row(prompt):
    polite = start("decode", prompt, "--max-new-tokens", 4000)
    shown = polite.stdout.read(20)  # it is writing text now
    polite.send_signal(signal.SIGINT)
    rest, err = polite.communicate(timeout=60)
    killed = start("decode", prompt, "--max-new-tokens", 4000)
    killed.stdout.read(20)
    killed.kill()
    killed.communicate()
    out = (shown + rest).decode()
    assert polite.returncode == 130 and b"Traceback" not in err and b"is kept as run" in err and "speedup" in out
    runs = Store().runs()
    assert len(runs) == 2 and {r.status for r in runs} == {"interrupted"}
    finished = next(r for r in runs if r.prompts)
    kept = Store().prompts(finished.run_id)[0]
    assert kept.text and out.startswith(kept.text) and len(kept.tokens) == finished.new_tokens > 0


def test_sigterm_ends_a_background_run_as_ctrl_c_does(prompt):
    """Shells start background jobs with SIGINT ignored; SIGTERM has to work all the same."""
    ignoring = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    process = start("decode", prompt, "--max-new-tokens", 4000, preexec_fn=ignoring)
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)  # stays ignored
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"is kept as run" in err
    assert Store().runs()[0].status == "interrupted" and Store().runs()[0].new_tokens > 0


@pytest.mark.parametrize(
    ("words", "sign"),
    [
        (("prepare", RECIPES / "llama_4k.yaml", "--set", "seed=3", "--out", "here"), b"passages: 1"),
        (("bench", RECIPES / "bench_pocket.yaml", "--quick", "--arms", "bd-256"), b"% done"),
    ],
    ids=["prepare", "bench"],
)
def test_an_interrupted_command_says_how_to_continue(words, sign, tmp_path):
    """With all of its options, not with the recipe alone."""
    process = start(*words, cwd=tmp_path)
    assert any(sign in line for line in process.stderr)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"invalid" not in err and b"Traceback" not in err
    assert f"continue with: bdcli {shlex.join(map(str, words))}\n".encode() in err
    assert all("×" in row for row in out.decode().splitlines()[1:]), "no row of a cell that was not reached"


def test_two_processes_decode_at_once(prompt):
    both = [start("decode", prompt, "--max-new-tokens", 12, "--json") for _ in range(2)]
    ids = {json.loads(p.communicate(timeout=120)[0])["run_id"] for p in both}
    assert ids == {r.run_id for r in Store().runs()} and len(ids) == 2


HEAVY = {"torch", "transformers", "datasets", "matplotlib"}


@pytest.mark.parametrize(
    ("args", "unwanted"),
    [
        (["--help"], {*HEAVY, "sqlmodel", "sqlalchemy"}),
        (["decode", "--help"], {*HEAVY, "sqlmodel", "sqlalchemy"}),
        (["report"], HEAVY),
        (["report", "--format", "json"], HEAVY),
    ],
)
def test_light_commands_import_nothing_heavy(args, unwanted):
    code = """if True:
        import sys, bdcli.cli.main
        sys.argv = ["bdcli", *sys.argv[1:]]
        try:
            bdcli.cli.main.main()
        except SystemExit as stop:
            assert not stop.code
        print(*sys.modules, file=sys.stderr)
    """
    done = subprocess.run([sys.executable, "-c", code, *args], check=True, capture_output=True, text=True)
    assert not unwanted & set(done.stderr.split())


def test_version(cli):
    from bdcli import __version__

    assert cli("--version").out == f"bdcli {__version__}\n"
    assert Path(POCKET / "target" / "README.md").exists()
