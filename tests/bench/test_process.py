"""Guarded processes: lines both ways, pauses, deaths, and that nothing outlives us, however we end."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from bdcli.bench.process import GuardedProcess, PeerError

ECHO = """
import json, os, sys
for line in sys.stdin:
    print(json.dumps({"got": json.loads(line), "pid": os.getpid()}), flush=True)
"""
FAMILY = """
import subprocess, sys, time, os, json
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(json.dumps({"pids": [os.getpid(), child.pid]}), flush=True)
time.sleep(600)
"""


def process(code: str) -> GuardedProcess:
    return GuardedProcess("tool", [sys.executable, "-c", code])


def gone(pids: list[int], within_s: float = 10.0) -> bool:
    """Every process has ended, or is a zombie that nobody has waited for."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        alive = [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.05)
    return False


def test_messages_are_lines_and_the_process_ends_with_its_input():
    tool = process(ECHO)
    tool.send({"a": 1})
    assert tool.receive(20)["got"] == {"a": 1} and tool.alive
    tool.close()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; sys.exit('no memory')", "tool ended with exit code 1: no memory"),
        ("import os; os.abort()", "tool ended with exit code 134"),
        ("print('hello', flush=True); input()", "tool answered b'hello"),
        ('print(\'{"error": "bad model"}\', flush=True); input()', "tool: bad model"),
        ("import time; time.sleep(600)", "tool did not answer within 1 s"),
    ],
)
def test_what_goes_wrong_has_a_reason(code, reason):
    tool = process(code)
    with pytest.raises(PeerError, match=reason):
        tool.receive(1 if "sleep" in code else 20)
    tool.close()


def test_a_command_that_is_not_there_is_named():
    tool = GuardedProcess("tool", ["/nowhere/tool"])
    with pytest.raises(PeerError, match="/nowhere/tool: No such file"):
        tool.receive(20)
    tool.close()


def test_a_paused_process_does_not_run_and_can_be_closed():
    tool = process(ECHO)
    tool.send({})
    echo = psutil.Process(tool.receive(20)["pid"])
    tool.pause()
    until = time.monotonic() + 10
    while echo.status() != psutil.STATUS_STOPPED and time.monotonic() < until:
        time.sleep(0.01)
    tool.send({"n": 1})
    with pytest.raises(PeerError, match="did not answer"):
        tool.receive(0.5)
    tool.resume()
    assert tool.receive(20)["got"] == {"n": 1}
    tool.pause()
    tool.close()


def test_closing_ends_what_the_process_started():
    tool = process(FAMILY)
    pids = tool.receive(20)["pids"]
    tool.close()
    assert gone(pids)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_us(number):
    code = (
        "import sys; from bdcli.bench.process import GuardedProcess as G\n"
        f"tool = G('tool', [sys.executable, '-c', {FAMILY!r}]); tool.pause(); tool.resume()\n"
        "print(*tool.receive(20)['pids'], flush=True); tool.pause(); input()"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    pids = [int(word) for word in starter.stdout.readline().split()]
    assert all(map(psutil.pid_exists, pids)) and len(pids) == 2
    os.kill(starter.pid, number)
    starter.wait(20)
    assert gone(pids)
