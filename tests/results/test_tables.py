"""Runs as tables and as one page."""

from bdcli.results import tables
from bdcli.results.page import write_page


def test_tables_put_the_arms_of_a_sweep_side_by_side(swept, cli):
    head, body = tables.side_by_side(swept)
    assert head == ["arm", "pg19 4k", "pg19 16k"] and [row[0] for row in body] == ["ar", "bd", "full", "lookup"]
    assert body[1][1] == "1.91× (1.83–2.00) 10.5"
    shown = cli("report", "--side-by-side").out
    assert shown.splitlines()[3].startswith("| bd | 1.91×")
    lines = cli("report", "--ctx", "16k").out.splitlines()
    assert len(lines) == 5 and lines[0].split()[:3] == ["dataset", "ctx", "arm"] and "lookup" in lines[4]


def test_a_page_holds_everything_itself(swept, tmp_path, cli):
    page = tmp_path / "page.html"
    assert cli("report", "--html", page).code == 0
    html = page.read_text("utf-8")
    assert "<svg" in html and "1.91× (1.83–2.00) 10.5" in html and "Where we are beaten" in html
    assert not [word for word in ("<script", "<link", "<img", "@import", "url(http") if word in html]
    write_page(swept[:1], page)
    assert "pg19" in page.read_text("utf-8")
