"""`bdcli report`: formats, filters, pages and pictures of stored runs."""

import csv
import io
import json
import os
from pathlib import Path

from bdcli.results.schema import Evaluation, Loss, Run
from bdcli.results.store import Store


def test_formats_agree(tmp_path, cli):
    store = Store(str(tmp_path / "runs.db"))
    for speedup in (1.25, 2.0):
        run_id = store.begin("decode", {}, context=4096)
        store.finish(run_id, "done", speedup=speedup, acceptance_rate=0.5, budget=512)
    as_json = cli("report", "--format", "json").json["runs"]
    rows = list(csv.DictReader(io.StringIO(cli("report", "--format", "csv").out)))
    assert [r["speedup"] for r in as_json] == [2.0, 1.25] == [float(r["speedup"]) for r in rows]
    assert set(as_json[0]) == set(Run.model_fields) == set(rows[0])
    for form in ("markdown", "table"):
        shown = cli("report", "--format", form).out
        assert shown.index("2.00×") < shown.index("1.25×") and "50.0 %" in shown
    assert len(cli("report", "--format", "json", "--limit", 1).json["runs"]) == 1


def test_report_on_nothing(cli):
    done = cli("report")
    assert done.code == 0 and "bdcli decode PROMPT_FILE" in done.err
    assert json.loads(cli("report", "--format", "json").out) == {"runs": []}
    gone = cli("report", "--db", "nowhere.db")
    assert gone.code == 2 and "there is no store at nowhere.db" in gone.err
    assert not Path("nowhere.db").exists() and not Path(os.environ["BDCLI_DB"]).exists()


def test_one_run_shows_what_it_measured_step_by_step(cli, tmp_path):
    store = Store(str(tmp_path / "runs.db"))
    distil, pretrain = store.begin("distill", {}), store.begin("pretrain", {})
    where = {"dataset": "pg19", "context": 4096, "budget": 256, "gamma": 5, "passages": 3}
    store.add_measurements([Evaluation(run_id=distil, step=s, acceptance_rate=s / 8, **where) for s in (0, 4)])
    losses = {"context": 512, "windows": 2, "nll": 3.0, "tail_nll": 2.5, "tail_nll_short": 2.75}
    store.add_measurements([Loss(run_id=pretrain, step=1, tokens=4096, **losses)])
    table = cli("report", "--run", distil).out.splitlines()
    assert table[0].split() == ["dataset", "context", "budget", "step", "0", "step", "4"] and "50.0 %" in table[1]
    assert [e["step"] for e in cli("report", "--run", distil, "--format", "json").json["evaluations"]] == [0, 4]
    assert cli("report", "--run", pretrain, "--format", "markdown").out.splitlines()[2] == (
        "| 1 | 4096 | 512 | 3.000 | +0.250 nat |"
    )
    curves = tmp_path / "curves.svg"
    assert "wrote" in cli("report", "--run", distil, "--plot", curves).err and curves.stat().st_size > 5000
    unknown = cli("report", "--run", "x")
    assert unknown.code == 2 and "run x has no acceptance grid" in unknown.err
