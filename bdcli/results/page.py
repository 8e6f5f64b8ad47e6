"""Stored runs as one HTML page with its pictures inside: nothing is fetched, so it can be mailed or kept."""

from __future__ import annotations

import tempfile
from html import escape
from pathlib import Path

from bdcli.base.errors import UserError
from bdcli.results.plots import plot
from bdcli.results.query import arrange, faster_rivals, refusals
from bdcli.results.schema import Run
from bdcli.results.tables import HEADINGS, rows, side_by_side

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th { text-align: right; border-bottom: 2px solid #444; padding: .2rem .6rem; white-space: nowrap; }
td { text-align: right; border-bottom: 1px solid #ddd; padding: .2rem .6rem; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; } svg { max-width: 100%; height: auto; } p.small { color: #555; }
"""


def write_page(runs: list[Run], path: Path) -> None:
    """Tables side by side and in full, pictures, and what was refused. Raises UserError where there is nothing."""
    if not runs:
        raise UserError("no run fits the filters", "Run bdcli bench or bdcli decode first")
    bench = [run for run in runs if run.command == "bench"]
    parts = ["<h1>BudgetDraft runs</h1>", *(f"<p class=small>{escape(line)}</p>" for line in _set_ups(runs))]
    parts.append(_picture(runs))
    if bench:
        parts += ["<h2>Side by side</h2><p class=small>speedup over AR (95 % interval) tokens a second</p>"]
        parts.append(_table(*side_by_side(bench)))
        parts += [_list("Where we are beaten", faster_rivals(bench)), _list("Refused", refusals(bench))]
    shown = rows(arrange(runs))
    keep = [i for i in range(len(HEADINGS)) if any(row[i] for row in shown)]
    parts.append("<h2>All runs</h2>")
    parts.append(_table([HEADINGS[i] for i in keep], [[row[i] for i in keep] for row in shown]))
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>BudgetDraft runs</title><style>{STYLE}</style>"
    try:
        path.write_text(page + "\n".join(parts) + "</html>\n", "utf-8")
    except OSError as error:
        raise UserError(f"--html {path}: {error.strerror}", "Give a path in an existing folder") from None


def _set_ups(runs: list[Run]) -> list[str]:
    """What was measured on what, once each."""
    lines = []
    for run in arrange(runs):
        stack = f"torch {run.versions.get('torch', '?')}, commit {run.git_revision or 'unknown'}"
        lines.append(f"{run.target} · {run.dtype} on {run.device} · {run.machine} · {stack}")
    return list(dict.fromkeys(lines))


def _picture(runs: list[Run]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plot.svg"
        try:
            plot(runs, file)
        except UserError as error:
            return f"<p class=small>No picture: {escape(error.problem)}.</p>"
        text = file.read_text("utf-8")
    return text[text.index("<svg") :]


def _table(head: list[str], body: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<div class=wide><table>" + line(head, "th") + "".join(line(row, "td") for row in body) + "</table></div>"


def _list(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    return f"<h2>{title}</h2><ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"
