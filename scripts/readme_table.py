"""Measure the README's table and plot on text files, and write them into README.md from the store.

    python scripts/readme_table.py measure FOLDER [--books 6]  # adds runs to docs/readme.db; goes on after a stop
    python scripts/readme_table.py render                      # README.md and docs/readme.svg from docs/readme.db

Every cell is `bdcli decode` at its defaults (fp32 or bf16 as the machine has it, γ auto, greedy) on prompts that end at
the same place of each book whatever the context; the arms of a book run one after another, so drift hits all alike.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from bdcli.plots import plot
from bdcli.store import Run, Store

ROOT = Path(__file__).parent.parent
DB, README, PICTURE = ROOT / "docs" / "readme.db", ROOT / "README.md", ROOT / "docs" / "readme.svg"
BEGIN, END = "<!-- table: scripts/readme_table.py render -->", "<!-- end of table -->"
CONTEXTS = (4096, 8192, 16384)
BUDGETS = (256, 512, 1024, 2048, None)
NEW_TOKENS = 128

app = typer.Typer(add_completion=False)


@app.command()
def measure(folder: Path, books: Annotated[int, typer.Option(help="Files to use, by name.")] = 6) -> None:
    """Decode every context × budget on the first files of a folder."""
    from bdcli.decode import load_pair
    from bdcli.options import DecodeOptions
    from bdcli.prompts import cut_prompt, read_prompt
    from bdcli.runs import decode_run

    store = Store(str(DB))
    pair = load_pair(DecodeOptions())
    done = {(r.dataset, r.context, r.budget) for r in store.runs() if r.status == "done"}
    for path in sorted(folder.glob("*.txt"))[:books]:
        text = read_prompt(str(path))
        for context in CONTEXTS:
            prompt = cut_prompt(pair.tokenizer, text, context)
            for budget in BUDGETS:
                if (path.stem, context, budget or "full") in done:
                    continue
                options = DecodeOptions(budget=budget, max_new_tokens=NEW_TOKENS)
                result = decode_run(store, options, str(path), prompt, pair=pair)
                rate, speedup = result["acceptance_rate"], result["speedup"]
                print(f"{path.stem} {context} {budget or 'full'}: {rate:.1%} {speedup:.2f}x", file=sys.stderr)
    store.close()
    render()


@app.command()
def render() -> None:
    """Write the table into README.md and draw the plot."""
    store = Store(str(DB), readonly=True)
    runs = [r for r in store.runs() if r.status == "done"]
    text = README.read_text("utf-8")
    head, rest = text.split(BEGIN)
    README.write_text(head + BEGIN + "\n" + table(runs) + "\n" + END + rest.split(END)[1], "utf-8")
    plot(runs, PICTURE)
    store.close()


def table(runs: list[Run]) -> str:
    """Markdown: counts are pooled over the prompts of a cell, speeds are medians over them."""
    names = "context, budget, acceptance, outside loops, mean length, AR tok/s, tok/s, speedup, loop rate, entries"
    lines = ["| " + names.replace(", ", " | ") + " |", "|" + " ---: |" * len(names.split(", "))]
    for context in CONTEXTS:
        for budget in ("full", *reversed([b for b in BUDGETS if b])):
            cell = [r for r in runs if r.context == context and r.budget == budget]
            if cell:
                lines.append("| " + " | ".join(row(context, budget, cell)) + " |")
    first = max(runs, key=lambda r: r.started_at)
    prompts = len({r.dataset for r in runs})
    pooled = f"{prompts} books of the PG-19 test split, {NEW_TOKENS} new tokens each, {first.dtype}, greedy, γ auto"
    lines += ["", f"{pooled}. {first.machine}; torch {first.versions['torch']}; commit {first.git_revision}."]
    return "\n".join(lines)


def row(context: int, budget: int | str, cell: list[Run]) -> list[str]:
    def speed(field: str) -> float:
        return median(getattr(r, field) for r in cell)

    clean = [r.acceptance_rate_no_loops for r in cell if r.acceptance_rate_no_loops is not None]
    new = sum(r.new_tokens for r in cell)
    return [
        f"{context // 1024}k",
        str(budget),
        f"{sum(r.accepted for r in cell) / sum(r.drafted for r in cell):.1%}",
        f"{median(clean):.1%}" if clean else "none clean",
        f"{new / sum(r.new_tokens / r.mean_accepted_length for r in cell):.2f}",
        f"{speed('ar_tokens_per_second'):.1f}",
        f"{speed('tokens_per_second'):.1f}",
        f"{speed('speedup'):.2f}×",
        f"{sum(r.loop_rate * r.new_tokens for r in cell) / new:.0%}",
        str(max(r.max_drafter_entries for r in cell)),
    ]


if __name__ == "__main__":
    app()
