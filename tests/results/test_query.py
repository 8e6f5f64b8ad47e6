"""Which runs are shown: filters, the fastest cells, and where a rival is ahead."""

import pytest

from bdcli.base.errors import UserError
from bdcli.results import query
from bdcli.results.query import Filter
from bdcli.results.store import Store
from tests.support.rows import add_run


def test_filters(tmp_path):
    store = Store(str(tmp_path / "r.db"))
    for context, budget in ((4096, 512), (4100, "full"), (3500, 256), (8192, 512), (7000, 512)):
        add_run(store, context=context, budget=budget)

    def contexts(**wanted):
        return sorted(r.context for r in store.runs() if Filter(**wanted)(r))

    assert contexts(ctx="4k") == [4096, 4100]
    assert contexts(ctx="4096") == [4096]
    assert contexts(ctx="8k") == [8192]  # 7000 is 14.6 % off
    assert contexts(budget="full") == [4100]
    assert contexts(budget="512", ctx="8k") == [8192]
    assert contexts(dataset="other") == [] and len(contexts(command="decode", status="done")) == 5
    with pytest.raises(UserError, match="--ctx banana"):
        contexts(ctx="banana")


def test_losses_are_named_and_best_picks_the_fastest_of_each_budget(swept):
    assert query.faster_rivals(swept) == [
        f"pg19 at {context}: lookup 2.27× ahead of bd 1.91×, beyond both intervals" for context in (4096, 16384)
    ]
    slower = swept[0].model_copy(update={"run_id": "x", "gamma": 9, "speedup": 0.1})
    assert slower not in query.best_cells([*swept, slower]) and len(query.best_cells([*swept, slower])) == 8
