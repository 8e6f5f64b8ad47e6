"""From the prompts of a cell to its figures, and the seal over both; made-up rows, no model runs here."""

import pytest

from bdcli.results.cells import acceptance, seal, summarise
from tests.support.cells import AR_ROWS, cell, text


def test_figures_are_pooled_counts_median_speeds_and_the_ratio_that_stands_beside_them():
    rows = [text(0, 10.0), text(1, 20.0), text(2, 12.0, rounds=[(2, 4, 1, 100_000, 0), (6, 8, 5, 100_000, 0)])]
    m = summarise(rows, AR_ROWS)
    assert (m["prompts"], m["new_tokens"], m["drafted"], m["accepted"]) == (3, 24, 28, 18)
    assert m["acceptance_rate"] == 18 / 28 and m["acceptance_rate_no_loops"] == (3 + 3 + 6) / (4 + 4 + 12)
    assert m["mean_accepted_length"] == 24 / 6
    assert (m["tokens_per_second"], m["ar_tokens_per_second"], m["speedup"]) == (12.0, 5.0, 2.4)
    assert m["speedup_low"] == 2.0 and m["speedup_high"] == 4.0 and m["ar_variation"] == 0.0
    # outside loops: rows 0 and 1 ran 4 tokens in 0.4 s there, row 2 8 in 0.2 s; AR's prompt 1 is nothing but a loop
    assert m["speedup_no_loops"] == pytest.approx((10 + 40) / 2 / 5)
    assert m["output_equal"] is True and m["ties"] == 0
    assert summarise([text(9)], AR_ROWS) == {"prompts": 0}


def test_a_tool_that_does_not_report_its_drafts_has_no_acceptance():
    m = summarise([text(0, rounds=[(4, None, 3, 1, 0), (4, None, 3, 1, 0)]), text(1)], AR_ROWS)
    assert m["acceptance_rate"] is None and m["drafted"] is None and m["acceptance_low"] is None
    assert m["mean_accepted_length"] == 4.0
    assert acceptance([text(0, rounds=[(8, 0, 0, 1, 0)])]) is None


def test_a_seal_breaks_when_row_or_prompt_changes():
    run, rows = cell(), [text(0), text(1)]
    before = seal(run, rows)
    run.status, rows[0].text = "interrupted", "shown otherwise"
    assert seal(run, rows) == before
    run.machine = "N"
    assert seal(run, rows) != before
    run.machine, rows[1].tokens_per_second = "M", 99.0
    assert seal(run, rows) != before
