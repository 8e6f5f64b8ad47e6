"""Claims about acceptance: texts decoded until there are enough, in one process or several, bounds and verdicts."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from bdcli.base.errors import UserError
from bdcli.bench.claims import Text, Worth, claimed_falls, clean_tokens, report, worth_rows
from bdcli.data.synthetic import recall_documents
from bdcli.model.hub import POCKET
from tests.support.scripts import SCRIPTS, call, load


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, body in recall_documents(8, 5000):
        (folder / f"{name.replace(':', '')}.txt").write_text(body, "utf-8")
    return folder


def test_claims_are_measured_until_there_is_enough(tmp_path, texts):
    script, out = load("claims"), tmp_path / "claims"
    words = (
        "run",
        "--on",
        f"x={texts}",
        "--out",
        out,
        "--ctx",
        "320,640",
        "--budgets",
        "64,full",
        "--new-tokens",
        "12",
        "--prompts",
        "6",
        "--dtype",
        "float32",
    )
    alone = call(script, *words, "--enough", "12")
    first = (out / "prompts.jsonl").read_text().splitlines()[1:]
    words += ("--naive", POCKET / "drafter")  # joins later
    shown = call(script, *words, "--enough", "12")
    assert (out / "prompts.jsonl").read_text().splitlines()[1 : len(first) + 1] == first and alone != shown
    lines = (out / "prompts.jsonl").read_text().splitlines()
    written = [Text(**json.loads(line)) for line in lines[1:]]
    assert {t.cell for t in written} == {
        ("x", c, t, d, b) for c in (320, 640) for t in (0.0, 1.0) for d in ("drafter", "naive") for b in (64, "full")
    }
    clean = clean_tokens(written)
    assert min(clean.values()) >= 12 and len({t.index for t in written}) < 6, "it stopped when there was enough"
    ends = {(t.index, t.context): t.source for t in written}
    assert all(ends[n, 320] == ends[n, 640] for n, _ in ends)
    greedy = [t for t in written if t.temperature == 0]
    for t in greedy:  # greedy text does not depend on who drafts
        same = [u for u in greedy if (u.index, u.context) == (t.index, t.context)]
        assert len({(u.tokens, u.clean) for u in same}) == 1
    assert "full - 64 at 640" in shown and "320 - 640 at budget 64" in shown and "context is worth" in shown
    worth = json.loads((out / "worth.json").read_text())
    ((rows,),) = ([*x.values()] for x in worth.values())
    assert len(rows) == 6 and {r["tokens"] for r in rows} == {384} and all(r["loss"] > 0 for r in rows)
    (out / "worth.json").write_text(json.dumps({key: {"x": rows[:4]} for key in worth}))  # as stopped after four
    (out / "prompts.jsonl").write_text("\n".join(lines[:-3]) + '\n{"dataset": "x", "sou')  # as after kill -9
    assert call(script, *words, "--enough", "12") == shown
    assert (out / "prompts.jsonl").read_text().splitlines() == lines
    with pytest.raises(UserError, match="measured with other models"):
        call(script, *words, "--gamma", "3")
    with pytest.raises(UserError, match="measured with other models"):
        call(script, *words[:-1], POCKET / "target")
    (out / "prompts.jsonl").write_text('{"key": "of an earlier version"}\n')
    with pytest.raises(UserError, match="measured with other models"):
        call(script, *words)


def test_claims_of_two_processes_are_those_of_one(tmp_path, texts):
    words = (
        "--on",
        f"x={texts}",
        "--ctx",
        "320,640",
        "--budgets",
        "64,full",
        "--temperatures",
        "0",
        "--prompts",
        "2",
        "--new-tokens",
        "12",
        "--dtype",
        "float32",
    )
    found = []
    for jobs in (1, 2):
        out = tmp_path / str(jobs)
        command = [sys.executable, SCRIPTS / "claims.py", "run", *words, "--out", out, "--jobs", str(jobs)]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        lines = (out / "prompts.jsonl").read_text().splitlines()
        found.append((shown.splitlines()[:6], lines[0], sorted(lines[1:])))
    assert found[0] == found[1] and len(found[0][2]) == 2 * 2 * 2


def test_bounds_of_the_claims():
    def text(n, context, budget, accepted, drafter="drafter", temperature=0.0):
        counts = {"tokens": 200, "clean": 150, "drafted": 100, "rounds": 40, "drafted_in_all": 0, "accepted_in_all": 0}
        return Text("x", f"book{n}@{9}", n, context, temperature, drafter, budget, accepted=accepted, **counts)

    texts = [
        text(n, c, b, a + n % 3)
        for n in range(12)
        for c in (4096, 16384)
        for b, a in ((256, 60 - 20 * (c > 5000)), ("full", 61))
    ]
    found = {f.what: f for f in claimed_falls(texts)}
    near, far = found["full - 256 at 4096"], found["4096 - 16384 at budget 256"]
    assert near.value == pytest.approx(0.01) and near.verdict(1800) == "holds"
    assert near.clean == 1800 and near.verdict(1801) == "too few tokens"
    assert found["full - 256 at 16384"].verdict(1800) == "does not hold"
    assert (far.value, far.upper) == pytest.approx((0.20, 0.20)) and far.verdict(1800) == "does not hold"
    alone = [text(n, 4096, 256, 5) for n in range(12, 20)]  # after prompts that no other cell has
    assert {f.what: f for f in claimed_falls(texts + alone)} == found
    assert not any("naive" in what for what in found)
    rival = [text(n, c, b, 62, "naive") for n in range(12) for c in (4096, 16384) for b in (256, "full")]
    shown = report(texts + rival, [], 5000)
    assert "does not yet test the claim" in shown and "(too few)" in shown
    rival = [replace(t, accepted=40) if t.budget == 256 else t for t in rival]
    assert "does not yet test" not in report(texts + rival, [], 5000)
    noisy = [text(n, 4096, b, (50 + 40 * (n % 2)) if b == 256 else 71) for n in range(12) for b in (256, "full")]
    assert next(claimed_falls(noisy)).verdict(1000) == "not shown"


def test_what_a_context_is_worth():
    def row(gains, dataset="x"):
        rows = list(worth_rows([Worth(dataset, f"b{n}@1", 16384, 1024, 3, 3 + g) for n, g in gains]))
        return [cell.strip() for cell in rows[3].split("|")[1:-1]]

    assert " ".join(row([(n, 0.08) for n in range(9)])) == "x 16384 9 3.000 3.080 +0.080 +0.080 0.05 holds"
    assert row([(n, 0.04) for n in range(9)])[-1] == "does not hold"
    noisy = [(n, 0.3 * (n % 3 == 0) - 0.04) for n in range(9)]
    assert row(noisy)[5] == "+0.060" and row(noisy)[-1] == "not shown"
    assert row([(n % 4, 0.08) for n in range(9)])[6:] == ["", "0.05", ""], "no bound from four documents"
    both = [Worth(d, f"b{n}@1", 16384, 1024, 3, 3 + g) for d, g in (("x", 0.02), ("y", 0.1)) for n in range(6)]
    assert [line.split(" | ")[0] for line in worth_rows(both)][3:] == ["| x", "| y", "| all"]
    assert list(worth_rows(both))[-1].split(" | ")[5] == "+0.060"
