"""The paper's protocol: its recipe, and its figures beside ours."""

from pathlib import Path

from bdcli.bench import paper
from bdcli.config.bench import BenchRecipe
from bdcli.config.loader import load_recipe
from bdcli.results.store import Store
from tests.support.cells import sweep


def test_the_papers_figures_stand_beside_ours(tmp_path):
    swept = sweep(Store(str(tmp_path / "runs.db")))
    rows = paper.compare(swept)
    assert [(r["context"], r["paper_speedup"], r["budget"]) for r in rows if r["context"] == 4096] == [
        (4096, 5.31, 256)
    ]
    shown = "\n".join(paper.lines(swept))
    assert "| pg19 | 4k | 256 | 4 | 1.91× | 5.31× |" in shown and "Not the same experiment" in shown
    assert paper.lines([]) == ["No valid cell to set beside the paper's."]


def test_the_papers_recipe_is_its_protocol():
    file = Path(__file__).parents[2] / "recipes" / "bench_paper.yaml"
    assert load_recipe(file, BenchRecipe) == load_recipe(None, BenchRecipe, paper.settings())
    assert {c: sum(c in a.contexts for a in load_recipe(file, BenchRecipe).arms.values()) for c in paper.GRIDS} == {
        4096: 12 + 3,
        8192: 6 + 3,
        16384: 8 + 3,
    }
