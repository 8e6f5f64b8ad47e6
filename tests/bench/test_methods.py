"""The table of methods, and peers beside our own: the same text in transformers, in its dtype or one of its own."""

import json
import shutil
from dataclasses import replace

from bdcli.bench.methods import METHODS
from bdcli.bench.peers import HfAutoregressive
from bdcli.config.bench import ENGINE_METHODS, PEER_METHODS
from bdcli.model.hub import POCKET
from tests.support.bench import SMALL, cells


def test_every_method_is_documented():
    assert set(METHODS) == {*ENGINE_METHODS, *PEER_METHODS}
    assert all(METHODS[name].peer == (name in PEER_METHODS) for name in METHODS)


def test_peers_write_the_same_text_and_are_shown_beside(cli):
    done = cli(*SMALL, "--methods", "hf-ar,hf-static,hf-assisted,hf-lookup", "--gamma", "auto,4", "--json")
    found = cells(done)
    plain = {"ar", "hf-ar", "hf-static"}
    assert {arm for _, arm in found} == plain | {"hf-assisted", "hf-assisted-g4", "hf-lookup", "hf-lookup-g4"}
    for cell in found.values():
        assert cell["output_equal"] is True and cell["valid"] and cell["speedup"] > 0, cell
    assisted = found[200, "hf-assisted-g4"]
    assert 0 < assisted["acceptance_rate"] < 1 and assisted["mean_accepted_length"] > 1


def test_peers_take_no_settings_from_the_folders(cli, tmp_path):
    """What a folder wants of generation is for its users; a comparison needs the plain settings on both sides."""
    wanted = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "num_beams": 2}
    wanted |= {"suppress_tokens": list(range(2, 40)), "forced_eos_token_id": 1}
    folders = []
    for role in ("target", "drafter"):
        folders.append(shutil.copytree(POCKET / role, tmp_path / role))
        path = folders[-1] / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | wanted))
    models = ["--target", folders[0], "--drafter", folders[1]]
    found = cells(cli(*SMALL, *models, "--methods", "hf-ar,hf-static,hf-assisted,hf-lookup", "--json"))
    assert {arm: (c["output_equal"], c["invalid_reason"]) for (_, arm), c in found.items()} == dict.fromkeys(
        ("ar", "hf-ar", "hf-static", "hf-assisted", "hf-lookup"), (True, None)
    )


def test_a_greedy_peer_of_the_same_dtype_with_another_text_is_remarked(cli, monkeypatch):
    arms = ["--set", "arms.half={method: hf-ar, dtype: bfloat16}", "--set", "arms.same={method: hf-ar}"]
    generate = HfAutoregressive.generate

    def other(self, *args):
        outcome = generate(self, *args)
        return replace(outcome, tokens=[*outcome.tokens[:-1], outcome.tokens[-1] + 1])

    monkeypatch.setattr(HfAutoregressive, "generate", other)
    done = cli(*SMALL, *arms, "--arms", "half,same", "--json")
    assert all(cell["valid"] for cell in cells(done).values())
    line = "stdlib 200 same: 2 of 2 texts differ from AR's, which ran in the same dtype"
    assert done.json["remarks"] == [line] and f"bdcli: {line}" in done.err


def test_a_peer_runs_in_a_dtype_of_its_own(cli):
    arms = [f"arms.{name}={{method: hf-ar, dtype: {name}}}" for name in ("float32", "bfloat16")]
    words = [word for arm in arms for word in ("--set", arm)]
    found = cells(cli(*SMALL, *words, "--arms", "float32,bfloat16", "--json"))
    assert {arm: c["dtype"] for (_, arm), c in found.items()} == {
        "ar": "float32",
        "float32": "float32",
        "bfloat16": "bfloat16",
    }
    assert all(c["valid"] and c["speedup"] > 0 for c in found.values())
    assert found[200, "float32"]["output_equal"] is True
    assert all(r["valid"] for r in cli("report", "--format", "json").json["runs"])
