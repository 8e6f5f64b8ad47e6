"""The table of methods, and peers beside our own: the same text in transformers, in its dtype or one of its own."""

from bdcli.bench.methods import METHODS
from bdcli.config.bench import ENGINE_METHODS, PEER_METHODS
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
