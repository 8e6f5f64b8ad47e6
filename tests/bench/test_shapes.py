"""Speed of shapes with random weights: the figures' contract, the stored row, and what a text would gain."""

import pytest

from bdcli.base.errors import UserError
from bdcli.bench import paper
from bdcli.bench.shapes import accept_probability, accepted_length, parse_shape
from bdcli.results.store import Store

CELL = {
    "context",
    "ar_ms",
    "ar_bytes",
    "ar_share",
    "host_share",
    "rounds_budget",
    "rounds",
    "drafts",
    "tokens_per_second",
    "peers_ms",
}


def test_a_pair_of_shapes_is_measured_and_stored_as_one_run(cli):
    words = ["bench", "--shape", "tiny+tiny", "--ctx", "256,4k", "--budgets", "64,full", "--gamma", "1,3", "--quick"]
    done = cli(*words, "--dtype", "float32", "--engine", "torch", "--json")
    assert done.code == 0, done.err
    found = done.json
    assert (found["shape"], found["engine"], found["dtype"]) == ("tiny+tiny", "torch", "float32")
    assert [cell["context"] for cell in found["contexts"]] == [256, 4096]
    for cell in found["contexts"]:
        assert set(cell) == CELL and cell["rounds_budget"] == 64 and cell["ar_ms"] > 0
        assert set(cell["rounds"]) == {"1", "3"} and [d["budget"] for d in cell["drafts"]] == [64, "full"]
        assert set(cell["peers_ms"]) == {"torch", "transformers static"}
        assert all(row.keys() == {"ms", "verify_ms", "verify_over_ar", "host_share"} for row in cell["rounds"].values())
    plain, published = found["contexts"]
    assert [row["acceptance_rate"] for row in plain["tokens_per_second"]] == [None]
    rates = {figures.acceptance_rate for (_, context), figures in paper.PUBLISHED.items() if context == 4096}
    assert {row["acceptance_rate"] for row in published["tokens_per_second"]} == {None, *rates}
    (run,) = Store().runs()
    assert (run.run_id, run.command, run.status, run.context) == (found["run_id"], "shape", "done", 4096)
    assert run.config["budgets"] == [64, None] and run.config["measured"]["contexts"] == found["contexts"]


@pytest.mark.parametrize("rate", [0.2, 0.5226, 0.7937])
def test_a_probability_gives_the_rate_it_was_found_for(rate):
    probability = accept_probability(rate, 5)
    assert (accepted_length(probability, 5) - 1) / 5 == pytest.approx(rate)


def test_an_unknown_shape_and_options_without_a_meaning_are_one_line(cli):
    with pytest.raises(UserError, match=r"must be TARGET\+DRAFTER"):
        parse_shape("tiny")
    for words, message in {
        ("tiny+none",): "--shape tiny+none: must be TARGET+DRAFTER",
        ("tiny+tiny", "--gamma", "auto"): "--gamma auto has no meaning for --shape",
        ("tiny+tiny", "--methods", "bd"): "takes no --methods",
    }.items():
        done = cli("bench", "--shape", *words)
        assert done.code == 2 and message in done.err and not Store().runs()
