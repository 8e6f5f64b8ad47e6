"""The protocol of the paper (arXiv 2606.00144), and its figures beside ours.

Greedy, 256 new tokens, 10 prompts of which the first is a warm-up, and for every cell the fastest γ of a grid and the
fastest budget. The grids depend on the context. It is for comparing with what was published. The default protocol of
`bench` is the more honest one: γ is chosen while decoding, all prompts count, and loops are reported apart.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

from bdcli.config.bench import Arm
from bdcli.results.cells import best
from bdcli.results.schema import Run

BUDGET = 2048
GRIDS = {4096: range(5, 61, 5), 8192: range(5, 31, 5), 16384: range(5, 41, 5)}
SECOND_BUDGET, SECOND_GRID = 512, range(5, 16, 5)  # with the γ at which a small drafter can win at all


class Published(NamedTuple):
    """What the paper reports at B = 2048 or at its best budget."""

    speedup: float
    acceptance_rate: float


PUBLISHED = {
    ("pg19", 4096): Published(5.31, 0.6798),
    ("longbench", 4096): Published(5.56, 0.6744),
    ("lwm", 4096): Published(6.55, 0.7937),
    ("pg19", 8192): Published(4.27, 0.5226),
    ("longbench", 8192): Published(2.13, 0.2043),
    ("lwm", 8192): Published(4.46, 0.5511),
    ("pg19", 16384): Published(1.22, 0.1881),
    ("longbench", 16384): Published(1.53, 0.2798),
    ("lwm", 16384): Published(2.10, 0.3417),
}
SET_UP = "YaRN-Llama-2-7B-128K with a llama-68m drafter on hardware of its own"


def settings() -> list[str]:
    """The protocol as overrides of a bench recipe."""
    arms = {f"g{g}-at-{c}": Arm("bd", BUDGET, g, contexts=(c,)) for c, grid in GRIDS.items() for g in grid}
    arms |= {
        f"b{SECOND_BUDGET}-g{g}-at-{c}": Arm("bd", SECOND_BUDGET, g, contexts=(c,)) for c in GRIDS for g in SECOND_GRID
    }
    values = {
        "protocol": "paper",
        "temperature": 0,
        "max_new_tokens": 256,
        "samples": 10,
        "warmup_samples": 1,
        "contexts": list(GRIDS),
        "datasets": {"pg19": ["pg19"], "longbench/qmsum": ["longbench/qmsum"], "lwm": ["lwm"]},
        "arms": {"ar": {"method": "ar"}, **{name: asdict(arm) for name, arm in arms.items()}},
    }
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def compare(runs: Sequence[Run]) -> list[dict]:
    """Our fastest valid drafting cell of each data set and context, and what the paper published for it."""
    drafting = [run for run in runs if run.method in ("bd", "full", "official")]
    rows = []
    for run in best(drafting, lambda r: (r.dataset, r.context)):
        published = PUBLISHED.get((run.dataset.partition("/")[0], run.context))
        rows.append(
            {
                "dataset": run.dataset,
                "context": run.context,
                "budget": run.budget,
                "gamma": run.gamma,
                "speedup": run.speedup,
                "acceptance_rate": run.acceptance_rate,
                "acceptance_rate_no_loops": run.acceptance_rate_no_loops,
                "loop_rate": run.loop_rate,
                "paper_speedup": published and published.speedup,
                "paper_acceptance_rate": published and published.acceptance_rate,
            }
        )
    return rows


def lines(runs: Sequence[Run]) -> list[str]:
    """The comparison as a Markdown table, and one line on where the two set-ups differ."""

    def cell(value: float | None, pattern: str) -> str:
        return "" if value is None else pattern.format(value)

    rows = compare(runs)
    if not rows:
        return ["No valid cell to set beside the paper's."]
    head = "| data | context | budget | best γ | speedup | paper | acceptance | outside loops | paper | loops |"
    out = [head, "|" + " ---: |" * 10]
    for r in rows:
        words = [
            r["dataset"],
            f"{r['context'] // 1024}k",
            str(r["budget"]),
            str(r["gamma"]),
            cell(r["speedup"], "{:.2f}×"),
            cell(r["paper_speedup"], "{:.2f}×"),
            cell(r["acceptance_rate"], "{:.1%}"),
            cell(r["acceptance_rate_no_loops"], "{:.1%}"),
            cell(r["paper_acceptance_rate"], "{:.1%}"),
            cell(r["loop_rate"], "{:.0%}"),
        ]
        out.append("| " + " | ".join(words) + " |")
    run = runs[0]
    out.append("")
    out.append(
        f"Not the same experiment: the paper measured {SET_UP}; this is {run.target} with {runs[-1].drafter}, "
        f"{run.dtype} on {run.machine}, with its own prompts."
    )
    return out
