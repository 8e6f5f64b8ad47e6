"""Measure the pocket pair's matrix, and write the pages of results, README's table and docs/results.svg.

    python scripts/results.py measure --books FOLDER [--qmsum FILE.jsonl] [--lwm FILE.jsonl]   # resumes after a stop
    python scripts/results.py render                                                         # from docs/results.db.gz

`measure` runs `bdcli bench` with recipes/bench_pocket.yaml, the paper's protocol with recipes/bench_paper.yaml, and one
cell three times, into a store of its own, and keeps what the pages show in docs/results.db.gz. To look into it:
gunzip -k docs/results.db.gz; bdcli report --db docs/results.db. The pages themselves are `result_pages`.
"""

from __future__ import annotations

import gzip
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from claims_page import claims_page, read_archive
from result_pages import pages, readme_table

from bdcli.base.files import write_file
from bdcli.bench import paper
from bdcli.results.plots import plot
from bdcli.results.query import check_cells
from bdcli.results.schema import Run
from bdcli.results.store import Store

ROOT = Path(__file__).parent.parent
DOCS, README = ROOT / "docs", ROOT / "README.md"
DB, CLAIMS, PICTURE = DOCS / "results.db.gz", DOCS / "claims.tar.gz", DOCS / "results.svg"
WORK = ROOT / "runs" / "results.db"
BEGIN, END = "<!-- table: scripts/results.py render -->", "<!-- end of table -->"
REPEATED = ("bd-512",)  # measured three times, at the shortest context

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
        raise SystemExit("the sweep did not finish; start this script again to resume it")


@app.command()
def keep() -> None:
    """Put into docs/results.db.gz what the pages show: the newest sweeps, and of the paper's grid the best and AR."""
    store = Store(str(WORK))
    main, repeats, published = sweeps(store.runs())
    store.close()
    best = {(r["dataset"], r["context"]): (r["budget"], r["gamma"]) for r in paper.compare(published)}
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
    """The kept cells, checked against their baselines and seals."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "results.db"
        copy.write_bytes(gzip.decompress(DB.read_bytes()))
        store = Store(str(copy))
        found = sweeps(check_cells(store.runs(), store))
        store.close()
    return found


@app.command()
def render() -> None:
    """Write the pages, README's table and the picture."""
    found = load()
    for name, text in (pages(*found) | {"claims.md": claims_page(*read_archive(CLAIMS))}).items():
        write_file(DOCS / name, text)
    head, rest = README.read_text("utf-8").split(BEGIN)
    write_file(README, head + BEGIN + "\n" + readme_table(found[0]) + "\n" + END + rest.split(END)[1])
    plot(found[0], PICTURE)


if __name__ == "__main__":
    app()
