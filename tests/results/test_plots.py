"""Pictures of runs and of sweeps."""

import pytest

from bdcli.base.errors import UserError
from bdcli.results import plots
from bdcli.results.store import Store
from tests.support.rows import add_run


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(tmp_path, suffix):
    store = Store(str(tmp_path / "r.db"))
    for context in (4096, 16384):
        for budget in (256, "full"):
            run_id = add_run(store, context=context, budget=budget)
            store.finish(run_id, "done", acceptance_rate=0.4, speedup=1.5)
    path = tmp_path / f"plot.{suffix}"
    plots.plot(store.runs(), path)
    assert path.stat().st_size > 5000
    with pytest.raises(UserError, match="picture format"):
        plots.plot(store.runs(), tmp_path / "plot.gif")


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_pictures_of_a_sweep(swept, tmp_path, suffix):
    path = tmp_path / f"plot.{suffix}"
    plots.plot(swept, path)
    assert path.stat().st_size > 8000
