"""`bdcli prompt` and `bdcli doctor`."""

import pytest


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


def test_doctor(cli):
    done = cli("doctor", "--json")
    assert done.code == 0 and all(check["ok"] for check in done.json.values())
    assert {"versions", "device", "dtype", "store", "pocket pair"} <= set(done.json)
