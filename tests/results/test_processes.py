"""Whether the process of a row that was left running is there: whatever the clock says, on this machine and others."""

import os
import subprocess
import sys

import pytest

from bdcli.results import processes
from bdcli.results.processes import computed_elsewhere, is_alive, mark_unknown, this_process
from bdcli.results.schema import Run
from bdcli.results.store import Store

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="identities are read from /proc")


def a_run(**columns):
    return Run(run_id="a", started_at=None, command="decode", status="running", **{**this_process(), **columns})


@linux_only
def test_a_clock_that_steps_ends_no_run(tmp_path):
    store = Store(str(tmp_path / "r.db"))
    run_id = store.begin("decode", {})
    store.update(run_id, process_started=this_process()["process_started"] + 3)
    code = "import sys; from bdcli.results.store import Store; print(Store(sys.argv[1]).runs()[0].status)"
    words = [sys.executable, "-c", code, str(tmp_path / "r.db")]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "running\n"
    store.update(run_id, host="renamed")
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "running\n"


@linux_only
def test_a_process_is_named_by_boot_namespace_and_ticks():
    mine = this_process()["process_identity"]
    boot, namespace, ticks = mine.split("/")
    assert is_alive(a_run()) is True
    assert is_alive(a_run(process_identity=f"{boot}/{namespace}/{int(ticks) + 1}")) is False, "the PID was given again"
    assert is_alive(a_run(process_identity=f"other-boot/{namespace}/{ticks}")) is False, "the machine was restarted"
    assert is_alive(a_run(process_identity=f"other-boot/{namespace}/{ticks}", host="h")) is None, "another machine"
    assert is_alive(a_run(process_identity=f"{boot}/1/{ticks}")) is None, "another container of this machine"
    assert is_alive(a_run(process_identity=f"{boot}/1/{ticks}", host="h")) is None


@linux_only
def test_a_process_that_has_ended_is_not_alive():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    run = a_run(pid=child.pid, process_identity=processes._identity(child.pid))
    assert is_alive(run) and computed_elsewhere(run) and not computed_elsewhere(a_run())
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_alive(run) is False, "a zombie"
    child.wait()
    assert is_alive(run) is False


def test_a_row_of_an_older_version_is_compared_by_the_clock():
    started = this_process()["process_started"]
    assert is_alive(a_run(process_identity=None)) is True
    assert is_alive(a_run(process_identity=None, process_started=started - 60)) is False
    assert is_alive(a_run(process_identity=None, host="h")) is None
    assert is_alive(a_run(pid=None)) is False


def test_a_report_marks_what_nobody_can_know(cli, tmp_path):
    store = Store(str(tmp_path / "runs.db"))
    here, there = store.begin("decode", {}), store.begin("decode", {})
    store.update(there, host="gone", process_identity="other-boot/1/2")
    rows = cli("report", "--format", "json").json["runs"]
    assert {row["run_id"]: row["status"] for row in rows} == {here: "running", there: "running?"}
    assert len(cli("report", "--format", "json", "--status", "running").json["runs"]) == 2
    assert {run.status for run in store.runs()} == {"running"}, "nothing is changed by showing it"
    assert [run.status for run in mark_unknown([a_run()])] == ["running"]
