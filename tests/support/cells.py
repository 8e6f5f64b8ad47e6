"""Made-up rows of a bench: prompts, cells, and a small stored sweep."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from bdcli.results import query
from bdcli.results.cells import seal, summarise
from bdcli.results.schema import Prompt, Run

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
