"""Gates name what is wrong with a cell, whatever its figures say."""

import pytest

from bdcli.results import gates
from tests.support.cells import AR_ROWS, EOS, LIMIT, cell, text

ROWS = [text(0), text(1)]
FRAUDS = {
    "an end token inside": ([text(0, tokens=[10, EOS, *range(12, 18)]), text(1)], {}, "continues after an end token"),
    "too long": ([text(0, tokens=list(range(10, 19)), rounds=[(9, 9, 8, 1, 0)]), text(1)], {}, "longer than 8"),
    "too short": ([text(0, tokens=[10], rounds=[(1, 0, 0, 1, 0)]), text(1)], {}, "ends before 8 tokens"),
    "another text": ([text(0, output_equal=False), text(1)], {}, "1 of 2 texts differ from AR's"),
    "non-finite logits": ([text(0), text(1), text(2, error="NonFiniteError: nan")], {}, "NonFiniteError: nan"),
    "one sample": ([text(0)], {}, "1 sample, at least 2"),
    "a loop": ([text(0, loop_rate=1.0), text(1, loop_rate=7 / 8)], {}, "the text loops: 15 of its 16 tokens"),
    "AR with another min-p": (ROWS, {"min_p": 0.1}, "another min_p"),
    "AR with a repetition penalty": (ROWS, {"repetition_penalty": 1.3}, "another repetition_penalty"),
    "over budget": ([text(0, max_drafter_entries=257), text(1)], {}, "held 257 entries, its budget is 256"),
    "accepted more than drafted": ([text(0, rounds=[(8, 4, 5, 1, 0)]), text(1)], {}, "accepted more than it drafted"),
    "tokens from nowhere": ([text(0, rounds=[(5, 4, 4, 1, 0)]), text(1)], {}, "do not add up"),
    "no speed": ([text(0, speed=float("inf")), text(1)], {}, "not a positive number"),
    "prompt AR never read": ([text(0), text(7)], {}, "AR has not read 1 of its 2 prompts"),
    "prompt of another length": ([text(0, context=8192), text(1)], {}, "a prompt is not 4096 tokens long"),
    "AR of another context": (ROWS, {"context": 8192}, "another context (8192, not 4096)"),
    "AR of another data set": (ROWS, {"dataset": "lwm"}, "another dataset"),
    "AR of another target": (ROWS, {"target": "U"}, "another target"),
    "AR of another machine": (ROWS, {"machine": "N"}, "another machine"),
    "AR in another dtype": (ROWS, {"dtype": "bfloat16"}, "another dtype"),
    "AR of another experiment": (ROWS, {"experiment": "f-1"}, "another experiment"),
    "AR with other stop rules": (ROWS, {"config": {"eos": [2], "max_new_tokens": LIMIT}}, "stops by another eos"),
    "an AR that drafts": (ROWS, {"method": "bd"}, "no AR baseline"),
}


@pytest.mark.parametrize("case", FRAUDS)
def test_planted_frauds_are_named(case):
    rows, ar_fields, why = FRAUDS[case]
    found = gates.objections(cell(), rows, cell(**{"method": "ar"} | ar_fields), AR_ROWS)
    assert len(found) >= 1 and any(why in line for line in found), found


def test_an_honest_cell_passes_and_peers_may_write_another_text():
    assert gates.objections(cell(), ROWS, cell("ar"), AR_ROWS) == []
    other = [text(i, output_equal=False) for i in range(2)]
    for dtype in ("float32", "bfloat16"):  # which may be another than AR's
        assert gates.objections(cell("hf-assisted", dtype=dtype), other, cell("ar"), AR_ROWS) == []
    warm = cell(config={"eos": [], "max_new_tokens": LIMIT, "warmup_samples": 1})
    assert "1 sample, at least 2 are needed" in list(gates.figure_objections(warm, ROWS))
    short = [text(i, loop_rate=6 / 8) for i in range(2)]  # grams that begin in the prompt count like any other
    assert list(gates.figure_objections(cell(), short)) == []
    half = [text(0, loop_rate=1.0), text(1)]  # loops are distinguished; only a cell of nothing else is refused
    assert list(gates.figure_objections(cell(), half)) == []
    over = [text(i, max_drafter_entries=300) for i in range(2)]
    assert list(gates.figure_objections(cell("official", budget=256), over)) == []  # its budget is no bound
