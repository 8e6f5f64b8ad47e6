"""Prepared windows and passages: made once, continued where they were stopped, refused for another recipe."""

import json
from dataclasses import replace

import pytest
import safetensors.numpy
from datasets import Dataset

from bdcli.base.errors import UserError
from bdcli.model.checkpoint import save_model
from bdcli.model.hub import POCKET
from bdcli.train.distill.run import Distillation
from tests.support.training import SMALL_DISTILL, Stop, StopAt, adds_up


def files_of(folder):
    return {p.name: p.read_bytes() for p in sorted((folder / "data").iterdir())}


def test_preparing_goes_on_at_the_missing_shard(tmp_path):
    data = replace(SMALL_DISTILL.data, shard_windows=2, cache="argmax")
    recipe = replace(SMALL_DISTILL, data=data, loss=replace(SMALL_DISTILL.loss, kind="ce"))
    whole = Distillation(recipe, tmp_path / "whole").material().windows()
    assert whole.shards == 3 and len(whole) == 5 and adds_up(vars(whole.accounts)) and adds_up(vars(whole.documents))

    with pytest.raises(Stop):
        Distillation(recipe, tmp_path / "stopped", StopAt("windows", 4)).material().windows()
    (tmp_path / "stopped" / "data" / "windows-00001.safetensors.999999999.new").write_bytes(b"half")  # as after kill -9
    assert len(json.loads((tmp_path / "stopped" / "data" / "manifest.json").read_text())["shards"]) == 1
    again = Distillation(recipe, tmp_path / "stopped").material().windows()
    assert again.accounts == whole.accounts and files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")
    shard = tmp_path / "whole" / "data" / "windows-00001.safetensors"
    table = Dataset.from_dict(safetensors.numpy.load_file(shard))  # how `datasets` reads a shard
    assert set(table.column_names) == {"ids", "written", "late", "loop_rate", "argmax"} and len(table) == 2
    assert table[1]["ids"] == whole.ids(3).tolist()
    torn = shard.read_bytes()[:-7]
    shard.write_bytes(torn)
    with pytest.raises(UserError, match=r"windows-00001\.safetensors is damaged"):
        Distillation(recipe, tmp_path / "whole").material().windows()
    assert shard.read_bytes() == torn


def test_material_of_another_target_is_refused(tmp_path):
    Distillation(SMALL_DISTILL, tmp_path / "run").material().windows()
    save_model(Distillation(SMALL_DISTILL, tmp_path / "x").models().drafter, POCKET / "drafter", tmp_path / "other")
    with pytest.raises(UserError, match="made for another target"):
        Distillation(replace(SMALL_DISTILL, target=str(tmp_path / "other")), tmp_path / "run").material().windows()
    with pytest.raises(UserError, match="made for another data"):
        other = replace(SMALL_DISTILL, data=replace(SMALL_DISTILL.data, windows=4))
        Distillation(other, tmp_path / "run").material().windows()
    (tmp_path / "run" / "data" / "manifest.json").write_text('{"parts": ')
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Distillation(SMALL_DISTILL, tmp_path / "run").material().windows()


def test_windows_the_target_loops_in_are_dropped_and_counted(tmp_path):
    recipe = replace(SMALL_DISTILL, data=replace(SMALL_DISTILL.data, written=1.0, max_loop_rate=0.0, windows=3))
    windows = Distillation(recipe, tmp_path).material().windows()
    assert len(windows) == 3 and windows.accounts.dropped["loops"] > 0 and adds_up(vars(windows.accounts))
    assert bool(windows.row(0)["written"]) and float(windows.row(0)["loop_rate"]) == 0
    looped = [rate for rate in windows.loop_rates if rate > 0]  # dropped texts are on record too
    assert len(looped) == windows.accounts.dropped["loops"] and windows.loop_rates.count(0) >= 3
