"""`bdcli prompt` and `bdcli doctor`."""

import io

import pytest

from bdcli.base.cgroup import Limits
from bdcli.base.errors import BdcliError
from bdcli.cli import doctor_limits


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
    assert {"versions", "device", "dtype", "store", "pocket pair", "places", "disk", "terminal"} <= set(done.json)


def test_doctor_names_what_would_bite(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor_limits, "read_limits", lambda: Limits(1.5))
    assert "CPU quota of 1.5" in doctor_limits.threads()
    monkeypatch.setattr(doctor_limits, "free_memory", lambda _device: 200_000_000)
    assert "limited to 0.20 GB" in doctor_limits.memory()
    monkeypatch.setattr(doctor_limits, "resident_memory", lambda: 0)
    with pytest.raises(BdcliError, match="Raise the limit"):
        doctor_limits.memory()
    monkeypatch.setattr(doctor_limits, "cache_folders", lambda: iter(()))
    with pytest.raises(BdcliError, match="XDG_CACHE_HOME"):
        doctor_limits.places()
    place = str(tmp_path / "r.db")
    assert "free beside the store" in doctor_limits.disk(place)
    monkeypatch.setattr(doctor_limits, "_file_system", lambda _folder: "nfs4")
    with pytest.raises(BdcliError, match=r"nfs4.*local file"):
        doctor_limits.disk(place)
    monkeypatch.setattr(doctor_limits, "disk_space", lambda _folder: 5_000_000)
    with pytest.raises(BdcliError, match="5 MB free"):
        doctor_limits.disk(place)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert "shown as ?" in doctor_limits.terminal()
