"""Measure the pocket pair's matrix, and write RESULTS.md, README's table and docs/results.svg from the store.

    python scripts/results.py measure --books FOLDER [--qmsum FILE.jsonl] [--lwm FILE.jsonl]   # goes on after a stop
    python scripts/results.py render                                                         # from docs/results.db.gz

`measure` runs `bdcli bench` with recipes/bench_pocket.yaml, the paper's protocol with recipes/bench_paper.yaml, and one
cell three times over, into a store of its own, and keeps what the pages show in docs/results.db.gz. To look into it:
gunzip -k docs/results.db.gz; bdcli report --db docs/results.db
"""

from __future__ import annotations

import gzip
import itertools
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from bdcli.bench import paper
from bdcli.config.bench import PEER_METHODS
from bdcli.results.plots import plot
from bdcli.results.schema import Run
from bdcli.results.store import Store
from bdcli.results.tables import checked, losses, markdown, refused, side_by_side

ROOT = Path(__file__).parent.parent
DB, PAGE, README, PICTURE = (ROOT / p for p in ("docs/results.db.gz", "RESULTS.md", "README.md", "docs/results.svg"))
WORK = ROOT / "runs" / "results.db"
BEGIN, END = "<!-- table: scripts/results.py render -->", "<!-- end of table -->"
REPEATED = ("bd-512",)  # measured three times over, at the shortest context
SHOWN = ("bd-256", "bd-512", "bd-2048", "full")  # README's rows; the fastest of transformers' follows them

app = typer.Typer(add_completion=False)


@app.command()
def measure(
    books: Annotated[Path, typer.Option(help="Folder of .txt books.")],
    qmsum: Annotated[Path | None, typer.Option(help="LongBench rows, .jsonl.")] = None,
    lwm: Annotated[Path | None, typer.Option(help="Documents to be summarised, .jsonl.")] = None,
    paper_samples: Annotated[
        int, typer.Option(help="Prompts of the paper's protocol (an hour), one of them warm-up; 0 skips it.")
    ] = 10,
    options: Annotated[
        list[str] | None, typer.Option(help="More words for every bdcli bench; may be repeated.")
    ] = None,
) -> None:
    """Run what is missing of every sweep, then render."""
    WORK.parent.mkdir(exist_ok=True)
    if not WORK.exists():  # the pages keep what is not measured now
        WORK.write_bytes(gzip.decompress(DB.read_bytes()))
    sets = [f"pg19={books}", *[f"{n}={p}" for n, p in (("longbench/qmsum", qmsum), ("lwm", lwm)) if p is not None]]
    own, published = ROOT / "recipes" / "bench_pocket.yaml", ROOT / "recipes" / "bench_paper.yaml"
    extra = [word for option in options or [] for word in option.split()]
    _bench(own, "--datasets", sets[0], *extra)
    for turn in range(3):
        _bench(
            own, "--datasets", sets[0], "--ctx", "4k", "--arms", ",".join(REPEATED), "--seed", str(100 + turn), *extra
        )
    if paper_samples:
        _bench(published, "--datasets", ",".join(sets), *extra, "--samples", str(paper_samples))
    keep()
    render()


def _bench(recipe: Path, *words: str) -> None:
    command = [sys.executable, "-m", "bdcli", "bench", str(recipe), *words, "--db", str(WORK)]
    print("$ bdcli bench " + " ".join(command[4:]), file=sys.stderr)
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        raise SystemExit("the sweep did not finish; start this script again to go on")


@app.command()
def keep() -> None:
    """Put into docs/results.db.gz what the pages show: the newest sweeps, and of the paper's grid the best and AR."""
    store = Store(str(WORK))
    main, repeats, published = sweeps(store.runs())
    store.close()
    best = {(r["dataset"], r["context"]): (r["budget"], r["gamma"]) for r in paper.beside(published)}
    wanted = [r for r in published if r.method == "ar" or best.get((r.dataset, r.context)) == (r.budget, r.gamma)]
    kept = sorted({r.run_id for r in (*main, *repeats, *wanted)})
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "results.db"
        shutil.copy(WORK, copy)
        connection = sqlite3.connect(copy)
        for table in ("run", "prompt"):
            connection.execute(f"DELETE FROM {table} WHERE run_id NOT IN ({','.join('?' * len(kept))})", kept)
        connection.commit()
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("VACUUM")
        connection.close()
        DB.write_bytes(gzip.compress(copy.read_bytes(), mtime=0))


def sweeps(runs: list[Run]) -> tuple[list[Run], list[Run], list[Run]]:
    """Cells of the newest full matrix, of the three repeats, and of the newest paper protocol; all in order."""
    done = sorted((r for r in runs if r.command == "bench" and r.status == "done"), key=lambda r: r.started_at)
    published = [r for r in done if r.config.get("protocol") == "paper"]
    own = [r for r in done if r.config.get("protocol") != "paper"]
    sizes = Counter(r.experiment for r in own)
    large = [r for r in own if sizes[r.experiment] > 2]
    small = list(dict.fromkeys(r.experiment for r in own if sizes[r.experiment] == 2))[-3:]
    return (
        [r for r in large if r.experiment == large[-1].experiment],
        [r for r in own if r.experiment in small],
        [r for r in published if r.experiment == published[-1].experiment],
    )


def load() -> tuple[list[Run], list[Run], list[Run]]:
    """The kept cells, held against their baselines and seals."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "results.db"
        copy.write_bytes(gzip.decompress(DB.read_bytes()))
        store = Store(str(copy))
        found = sweeps(checked(store.runs(), store))
        store.close()
    return found


@app.command()
def render() -> None:
    """Write RESULTS.md, README's table and the picture."""
    found = load()
    PAGE.write_text(results_page(*found), "utf-8")
    text = README.read_text("utf-8")
    head, rest = text.split(BEGIN)
    README.write_text(head + BEGIN + "\n" + readme_table(found[0]) + "\n" + END + rest.split(END)[1], "utf-8")
    plot(found[0], PICTURE)


def counted(main: list[Run], context: int) -> tuple[list[Run], list[Run]]:
    """Our cells and transformers' of a context, those whose figures count."""
    here = [r for r in main if r.context == context and r.valid and r.tokens_per_second]
    return [r for r in here if r.method not in PEER_METHODS], [r for r in here if r.method in PEER_METHODS]


def fastest(runs: list[Run]) -> Run:
    return max(runs, key=lambda r: r.tokens_per_second)


def readme_table(main: list[Run]) -> str:
    names = "context, arm, acceptance, outside loops, mean length, AR tok/s, tok/s, speedup, 95 %, loops, entries"
    lines = ["| " + names.replace(", ", " | ") + " |", "|" + " ---: |" * len(names.split(", "))]
    for context in sorted({r.context for r in main}):
        _, peers = counted(main, context)
        rows = [r for arm in SHOWN for r in main if (r.arm, r.context) == (arm, context)]
        rows += [fastest(peers)] if peers else []
        lines += ["| " + " | ".join(_readme_row(run)) + " |" for run in rows]
    return "\n".join([*lines, "", set_up(main)])


def _readme_row(run: Run) -> list[str]:
    if not run.valid:
        return [f"{run.context // 1024}k", run.arm, "invalid", *[""] * 8]
    return [
        f"{run.context // 1024}k",
        run.arm,
        _rate(run.acceptance_rate),
        _rate(run.acceptance_rate_no_loops),
        f"{run.mean_accepted_length:.2f}",
        f"{run.ar_tokens_per_second:.1f}",
        f"{run.tokens_per_second:.1f}",
        f"{run.speedup:.2f}×",
        f"{run.speedup_low:.2f}–{run.speedup_high:.2f}",
        f"{run.loop_rate:.0%}",
        str(run.max_drafter_entries or ""),
    ]


def set_up(runs: list[Run]) -> str:
    """One line: prompts, settings, machine, versions, commit."""
    run = runs[0]
    datasets = ", ".join(dict.fromkeys(r.dataset for r in runs))
    packages = ", ".join(f"{name} {run.versions[name]}" for name in ("torch", "transformers") if name in run.versions)
    return (
        f"{run.prompts} prompts of {datasets}, {run.config['max_new_tokens']} new tokens each, {run.dtype}, "
        f"{'greedy' if run.temperature == 0 else f'temperature {run.temperature}'}. "
        f"{run.machine}; {packages}; commit {run.git_revision}."
    )


COLUMNS = {
    "context": lambda r: f"{r.context // 1024}k",
    "arm": lambda r: r.arm,
    "acceptance": lambda r: _rate(r.acceptance_rate),
    "outside loops": lambda r: _rate(r.acceptance_rate_no_loops),
    "mean length": lambda r: f"{r.mean_accepted_length:.2f}",
    "tok/s": lambda r: f"{r.tokens_per_second:.1f}",
    "speedup": lambda r: f"{r.speedup:.2f}×",
    "95 %": lambda r: f"{r.speedup_low:.2f}–{r.speedup_high:.2f}",
    "outside loops ": lambda r: "" if r.speedup_no_loops is None else f"{r.speedup_no_loops:.2f}×",
    "first token": lambda r: f"{r.ttft_s:.2f} s",
    "memory": lambda r: f"{r.peak_memory_bytes / 1e6:.0f} MB",
    "drafter KV": lambda r: "" if not r.drafter_kv_bytes else f"{r.drafter_kv_bytes / 1e6:.2f} MB",
    "equal to AR": lambda r: ("yes" if r.output_equal else "NO") + (f", {r.ties} ties" if r.ties else ""),
}


def results_page(main: list[Run], repeats: list[Run], published: list[Run]) -> str:
    """RESULTS.md, every number of it from the store."""
    ar = [r for r in main if r.method == "ar"]
    unsteady = ", ".join(f"{r.ar_variation:.1%} at {r.context // 1024}k" for r in ar)
    spread = max(r.ar_variation for r in ar)
    parts = [
        "# Results\n\nWritten by `scripts/results.py render` from `docs/results.db.gz`; a test compares the two. "
        "See README for the terms.\n",
        set_up(main),
        f"\nTolerance: AR's speed over the prompts of a cell varies by {unsteady} (standard deviation / mean), so "
        f"ratios closer than about {2 * spread:.0%} are not told apart; intervals are 95 % bootstraps over prompts. "
        "In bf16 a text counts as equal when every differing choice lies within four times our engine's logit error "
        "(none where its rows do not depend on each other); peers round otherwise, so theirs may part from ours, which "
        "is shown and no fault.\n",
        "## Side by side\n\nSpeedup over AR (95 % interval), tokens per second. Arms named -g5 and -g8 draft that "
        "many tokens a round; the others choose as they go. Peers (hf-) run the same weights, prompts and stop rules "
        "in transformers, in the same dtype or, where named -fp32, in fp32; hf-static with a static cache, the others "
        "with the dynamic one they come with.\n",
        markdown(*side_by_side(main)),
        *_against_transformers(main),
        "\n![acceptance, speed and memory](docs/results.svg)\n",
        "## Where we are beaten\n\nBy data set and context, every arm faster than our fastest budgeted one.\n",
        "\n".join(f"* {line}" for line in losses(main)) or "Nowhere in this matrix.",
        "\n## Every cell\n",
        markdown(list(COLUMNS), [[show(r) for show in COLUMNS.values()] for r in main if r.speedup]),
        *([_refused(main)] if refused(main) else []),
        *_repeats(repeats),
        *([_paper_head(published)] if published else []),
        "\n".join(paper.lines(published)) if published else "",
    ]
    return "\n".join(part for part in parts if part != "") + "\n"


def _against_transformers(main: list[Run]) -> list[str]:
    """Our AR and our fastest arm beside theirs, as ratios of tokens per second."""
    head, body = ["", "AR, over transformers' with the cache it comes with", "with a static cache"], []
    head += ["our fastest arm", "theirs, of any dtype", "ours over theirs"]
    for context in sorted({r.context for r in main}):
        own, peers = counted(main, context)
        if not peers:
            continue
        ar = next(r for r in own if r.method == "ar").tokens_per_second
        ours, theirs = fastest(own), fastest(peers)
        over = [
            ", ".join(f"{ar / r.tokens_per_second:.1f}× {r.dtype}" for r in peers if r.method == method)
            for method in ("hf-ar", "hf-static")
        ]
        both = [f"{r.arm} {r.tokens_per_second:.1f}" for r in (ours, theirs)]
        body.append([f"{context // 1024}k", *over, *both, f"{ours.tokens_per_second / theirs.tokens_per_second:.1f}×"])
    return ["\n## Against transformers\n", markdown(head, body)] if body else []


def _refused(main: list[Run]) -> str:
    """The cells whose figures do not count, with the reasons."""
    bad = [r for r in main if not r.valid]
    return "\nRefused:\n\n" + "\n".join(f"* {r.dataset} at {r.context}, {r.arm}: {r.invalid_reason}" for r in bad)


def _paper_head(published: list[Run]) -> str:
    run = published[0]
    tried: dict[tuple[int, int], set[int]] = {}
    names = " ".join(name for r in published for name in r.config["beside"])
    for budget, gamma, context in re.findall(r"(?:b(\d+)-)?g(\d+)-at-(\d+)", names):
        tried.setdefault((int(budget or paper.BUDGET), int(context)), set()).add(int(gamma))
    grids = "; ".join(
        f"{_span(sorted(gammas))} at budget {budget} and {context // 1024}k"
        for (budget, context), gammas in sorted(tried.items(), reverse=True)
    )
    return (
        f"\n## The paper's protocol\n\nGreedy, {run.config['max_new_tokens']} new tokens, the first prompt a warm-up, "
        f"and for every cell the fastest of γ {grids} (the paper's grids: 5 to 60, 5 to 30 and 5 to 40); {run.prompts} "
        f"prompts a cell counted here, 9 there; commit {run.git_revision}, with the pair that shipped then.\n"
    )


def _span(numbers: list[int]) -> str:
    """As `5 to 60 by 5` where the steps are equal, else all of them."""
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    return f"{numbers[0]} to {numbers[-1]} by {steps.pop()}" if len(steps) == 1 else ", ".join(map(str, numbers))


def _repeats(repeats: list[Run]) -> list[str]:
    """The same cell three times, and whether its intervals cover each other."""
    cells = [r for r in repeats if r.method != "ar"]
    if not cells:
        return []
    cover = max(r.speedup_low for r in cells) <= min(r.speedup_high for r in cells)
    shown = "; ".join(f"{r.speedup:.2f}× ({r.speedup_low:.2f}–{r.speedup_high:.2f})" for r in cells)
    verdict = "cover" if cover else "do NOT cover"
    first = cells[0]
    return [
        f"\n## The same cell again\n\n{first.arm} at {first.context // 1024}k, measured {len(cells)} times: {shown}. "
        f"The intervals {verdict} each other."
    ]


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


if __name__ == "__main__":
    app()
