"""Rows of decode runs."""

from __future__ import annotations

from bdcli.results.schema import Prompt


def add_run(store, **fields):
    run_id = store.begin("decode", {"budget": 512}, **{"context": 4096, "dataset": "book", **fields})
    store.finish(run_id, "done", [Prompt(run_id=run_id, source="x", sha256="0", text="t", tokens=[1, 2])])
    return run_id
