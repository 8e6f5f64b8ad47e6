"""The tables of the ablation: acceptance of every arm, and what training it costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from ablation_arms import ARMS, READINGS


def rate(found: list[dict], **wanted) -> float:
    """Mean acceptance outside loops over cells with these values; NaN where no clean token is there."""
    rates = [c["acceptance_rate_no_loops"] for c in found if all(c[k] == v for k, v in wanted.items())]
    rates = [r for r in rates if r is not None]
    return sum(rates) / len(rates) if rates else math.nan


def as_markdown(found: list[dict]) -> str:
    """Acceptance outside loops, mean over data sets, contexts and seeds (± half the range of the seeds)."""
    if not found:
        return "Nothing is measured yet."
    sample = found[0]["readings"]["window"]
    budgets, contexts = (list(dict.fromkeys(c[key] for c in sample)) for key in ("budget", "context"))
    numbers = [b for b in budgets if b != "full"]
    least, short, long = min(numbers), min(contexts), max(contexts)
    names = ["arm", "read", "seeds", *map(str, budgets), f"full - {least}", f"{short} - {long} at {least}"]
    names += [f"gained at {least}", "mean of budgets", "supervised positions a target token", "target tok/s"]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * 3 + " ---: |" * (len(names) - 3)]
    above: dict[str, tuple[float, float]] = {}  # means of the last row that is read the same way
    for name, reading in dict.fromkeys((r["arm"], reading) for r in found for reading in r["readings"]):
        runs = [r for r in found if r["arm"] == name and reading in r["readings"]]
        grids = [r["readings"][reading] for r in runs]
        at = {b: over_seeds(grids, lambda g, b=b: rate(g, budget=b)) for b in budgets}
        flat = over_seeds(grids, lambda g: rate(g, budget="full") - rate(g, budget=least))
        far = over_seeds(grids, lambda g: rate(g, budget=least, context=short) - rate(g, budget=least, context=long))
        means = at[least][0], sum(at[b][0] for b in numbers) / len(numbers)
        gained = [f"{100 * (x - y):+.1f}" for x, y in zip(means, above.get(reading, ()))] or ["", ""]
        above[reading] = means
        row = [ARMS[name].meaning, " ".join(READINGS[reading]), str(len(runs))]
        row += [f"{100 * m:.1f} ± {100 * s:.1f}" for m, s in at.values()]
        row += [f"{100 * m:+.1f} ± {100 * s:.1f}" for m, s in (flat, far)]
        lines.append("| " + " | ".join([*row, *gained, *training_cost(runs)]) + " |")
    kinds = ", ".join(dict.fromkeys(c["dataset"] for c in sample))
    passages = sum(c["passages"] for c in sample if c["budget"] == least)
    foot = f"Acceptance outside loops in %, γ {sample[0]['gamma']}, {passages} passages of {kinds}; "
    foot += "gained: against the row above that is read the same way."
    return "\n".join([*lines, "", foot])


def over_seeds(grids: list[list[dict]], value: Callable[[list[dict]], float]) -> tuple[float, float]:
    """Mean of a value over the grids of the seeds, and half its range."""
    values = [value(grid) for grid in grids]
    return sum(values) / len(values), (max(values) - min(values)) / 2


def training_cost(runs: list[dict]) -> list[str]:
    """Supervised positions and target tokens a second, empty where nothing was trained."""
    trained = [r["trained"] for r in runs if r["trained"]]
    if not trained:
        return ["", ""]
    speed = statistics.median(t["tokens_per_second"] for t in trained)
    return [f"{trained[0]['positions_per_target_token']:.3g}", f"{speed:.0f}"]


def cost_markdown(found: dict[str, dict]) -> str:
    """Positions, pace and memory of arms, each as `ablation.cost_of` gives them."""
    names = "arm, views, supervised positions per target forward, × the first, s a step, target tok/s, positions/s"
    names += ", peak memory, above loading"
    lines = ["| " + names.replace(", ", " | ") + " |", "| --- |" + " ---: |" * 8]
    first = next(iter(found.values()))["positions"]
    for name, c in found.items():
        pace = c["windows"] / c["seconds"]
        row = [ARMS[name].meaning, str(c["views"]), str(c["positions"]), f"{c['positions'] / first:.1f}"]
        row += [f"{c['seconds']:.2f}", f"{pace * c['context']:.0f}", f"{pace * c['positions']:.0f}"]
        row += [f"{c['peak'] / 1e9:.2f} GB", f"{(c['peak'] - c['loaded']) / 1e9:.2f} GB"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)
