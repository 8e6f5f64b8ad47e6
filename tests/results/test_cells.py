"""Figures, gates, the paper's table and the pages, from made-up rows: no model runs here."""

from datetime import UTC, datetime, timedelta

import pytest

from bdcli.base.statistics import bootstrap
from bdcli.bench import paper
from bdcli.config.bench import BenchRecipe
from bdcli.config.loader import load_recipe
from bdcli.results import gates, query, tables
from bdcli.results.cells import acceptance, seal, summarise
from bdcli.results.page import write_page
from bdcli.results.plots import plot
from bdcli.results.schema import Prompt, Run
from bdcli.results.store import Store

EOS, LIMIT = 1, 8


def text(index=0, speed=10.0, rounds=((4, 4, 3, 400_000, 0), (4, 4, 3, 400_000, 1)), **fields):
    """A prompt's row of eight tokens in two rounds, the second of which begins in a loop."""
    tokens = fields.pop("tokens", list(range(10, 18)))
    drafted = None if any(r[1] is None for r in rounds) else sum(r[1] for r in rounds)
    defaults = {
        "run_id": "r",
        "index": index,
        "source": "s",
        "sha256": f"hash{index}",
        "text": "t",
        "context": 4096,
        "tokens": tokens,
        "rounds": [list(r) for r in rounds],
        "new_tokens": len(tokens),
        "drafted": drafted,
        "accepted": sum(r[2] for r in rounds),
        "tokens_per_second": speed,
        "ttft_s": 1.0,
        "loop_rate": 0.0,
        "finish_reason": "length",
        "output_equal": True,
        "ties": 0,
        "max_drafter_entries": 256,
    }
    return Prompt(**defaults | fields)


def cell(method="bd", **fields):
    defaults = {
        "run_id": method,
        "command": "bench",
        "status": "done",
        "experiment": "e-1",
        "arm": method,
        "method": method,
        "dataset": "pg19",
        "context": 4096,
        "target": "T",
        "drafter": "D",
        "machine": "M",
        "host": "h",
        "device": "cpu",
        "dtype": "float32",
        "temperature": 0.0,
        "budget": 256 if method == "bd" else None,
        "gamma": 4 if method == "bd" else 0,
        "started_at": datetime(2026, 1, 1, tzinfo=UTC),
        "config": {"eos": [EOS], "max_new_tokens": LIMIT, "warmup_samples": 0},
        "versions": {"torch": "2"},
    }
    return Run(**defaults | fields)


AR_ROWS = [text(i, speed=5.0, rounds=[(1, 0, 0, 200_000, i % 2)] * 8, max_drafter_entries=None) for i in range(3)]


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


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says():
    import random
    from statistics import mean

    rng, covered = random.Random(5), 0
    for _ in range(200):
        low, high = bootstrap([rng.gauss(3.0, 1.0) for _ in range(12)], mean, resamples=200)
        covered += low <= 3.0 <= high
    assert 170 <= covered <= 200
    assert bootstrap([1.0], mean) == (None, None) and bootstrap([2.0, 2.0], mean) == (2.0, 2.0)


ROWS = [text(0), text(1)]
FRAUDS = {
    "an end token inside": ([text(0, tokens=[10, EOS, *range(12, 18)]), text(1)], {}, "continues after an end token"),
    "too long": ([text(0, tokens=list(range(10, 19)), rounds=[(9, 9, 8, 1, 0)]), text(1)], {}, "longer than 8"),
    "too short": ([text(0, tokens=[10], rounds=[(1, 0, 0, 1, 0)]), text(1)], {}, "ends before 8 tokens"),
    "another text": ([text(0, output_equal=False), text(1)], {}, "1 of 2 texts differ from AR's"),
    "non-finite logits": ([text(0), text(1), text(2, error="NonFiniteError: nan")], {}, "NonFiniteError: nan"),
    "one sample": ([text(0)], {}, "1 sample, at least 2"),
    "a loop": ([text(0, loop_rate=1 / 8), text(1, loop_rate=1 / 8)], {}, "the text loops: 2 of the 2 tokens"),
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
    half = [text(0, loop_rate=1 / 8), text(1)]  # loops are distinguished; only a cell of nothing else is refused
    assert list(gates.figure_objections(cell(), half)) == []
    over = [text(i, max_drafter_entries=300) for i in range(2)]
    assert list(gates.figure_objections(cell("official", budget=256), over)) == []  # its budget is no bound


def test_a_seal_breaks_when_row_or_prompt_changes():
    run, rows = cell(), [text(0), text(1)]
    before = seal(run, rows)
    run.status, rows[0].text = "interrupted", "shown otherwise"
    assert seal(run, rows) == before
    run.machine = "N"
    assert seal(run, rows) != before
    run.machine, rows[1].tokens_per_second = "M", 99.0
    assert seal(run, rows) != before


# -- pages


def sweep(store, contexts=(4096, 16384)):
    """Sealed cells of a small sweep in `store`."""
    for context in contexts:
        ar_id = None
        arms = {"ar": (5.0, None, 0), "bd": (10.0, 256, 4), "full": (6.0, "full", 4), "lookup": (12.0, None, "auto")}
        for n, (method, (speed, budget, gamma)) in enumerate(arms.items()):
            base = cell(method, context=context, budget=budget, gamma=gamma).model_dump()
            keep = {k: v for k, v in base.items() if v is not None and k not in ("run_id", "command", "status")}
            for name in ("started_at", "host", "machine", "versions", "config", "prompts", "seal"):
                keep.pop(name, None)
            run_id = store.begin("bench", {"eos": [EOS], "max_new_tokens": LIMIT}, **keep)
            ar_id = ar_id or run_id
            for i in range(2):
                rounds = [(1, 0, 0, 200_000, 0)] * 8 if method == "ar" else [(4, 4, 3, 400_000, 0)] * 2
                store.put_prompt(text(i, speed + i, rounds, run_id=run_id, context=context))
            figures = summarise(store.prompts(run_id), store.prompts(ar_id))
            moment = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=n)
            more = {"peak_memory_bytes": 10**8 * (n + 1), "status": "done", "valid": True, "started_at": moment}
            store.update(run_id, ar_run_id=ar_id, **figures | more)
            run = next(r for r in store.runs() if r.run_id == run_id)
            store.update(run_id, seal=seal(run, store.prompts(run_id)))
    return query.check_cells(store.runs(), store)


@pytest.fixture
def swept(tmp_path):
    return sweep(Store(str(tmp_path / "runs.db")))


def test_tables_put_the_arms_of_a_sweep_side_by_side(swept, cli):
    head, body = tables.side_by_side(swept)
    assert head == ["arm", "pg19 4k", "pg19 16k"] and [row[0] for row in body] == ["ar", "bd", "full", "lookup"]
    assert body[1][1] == "1.91× (1.83–2.00) 10.5"
    shown = cli("report", "--side-by-side").out
    assert shown.splitlines()[3].startswith("| bd | 1.91×")
    lines = cli("report", "--ctx", "16k").out.splitlines()
    assert len(lines) == 5 and lines[0].split()[:3] == ["dataset", "ctx", "arm"] and "lookup" in lines[4]


def test_losses_are_named_and_best_picks_the_fastest_of_each_budget(swept):
    assert query.faster_rivals(swept) == [
        f"pg19 at {context}: lookup 2.27× ahead of bd 1.91×, beyond both intervals" for context in (4096, 16384)
    ]
    slower = swept[0].model_copy(update={"run_id": "x", "gamma": 9, "speedup": 0.1})
    assert slower not in query.best_cells([*swept, slower]) and len(query.best_cells([*swept, slower])) == 8


def test_a_page_holds_everything_itself(swept, tmp_path, cli):
    page = tmp_path / "page.html"
    assert cli("report", "--html", page).code == 0
    html = page.read_text("utf-8")
    assert "<svg" in html and "1.91× (1.83–2.00) 10.5" in html and "Where we are beaten" in html
    assert not [word for word in ("<script", "<link", "<img", "@import", "url(http") if word in html]
    write_page(swept[:1], page)
    assert "pg19" in page.read_text("utf-8")


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_pictures_of_a_sweep(swept, tmp_path, suffix):
    path = tmp_path / f"plot.{suffix}"
    plot(swept, path)
    assert path.stat().st_size > 8000


def test_the_papers_figures_stand_beside_ours(swept):
    rows = paper.compare(swept)
    assert [(r["context"], r["paper_speedup"], r["budget"]) for r in rows if r["context"] == 4096] == [
        (4096, 5.31, 256)
    ]
    shown = "\n".join(paper.lines(swept))
    assert "| pg19 | 4k | 256 | 4 | 1.91× | 5.31× |" in shown and "Not the same experiment" in shown
    assert paper.lines([]) == ["No valid cell to set beside the paper's."]


def test_the_papers_recipe_is_its_protocol():
    from pathlib import Path

    file = Path(__file__).parents[2] / "recipes" / "bench_paper.yaml"
    assert load_recipe(file, BenchRecipe) == load_recipe(None, BenchRecipe, paper.settings())
    assert {c: sum(c in a.contexts for a in load_recipe(file, BenchRecipe).arms.values()) for c in paper.GRIDS} == {
        4096: 12 + 3,
        8192: 6 + 3,
        16384: 8 + 3,
    }
