"""Every kernel compiles for real architectures on a machine without a GPU, with tensor cores and without spills.

The interpreter must be off, whatever this process uses, so the check runs as the program it also is.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", minversion="3.4")  # older ones have no ptxas log to ask for


def check(*options):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bd_kernels.compile_check", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr[-5_000:])
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert reports and done.returncode == 0
    assert all(not report["faults"] and report["registers"] for report in reports)
    return reports


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_usual_variants_compile(arch):
    reports = check("--arch", arch, "--usual")
    families = {report["kernel"].split()[0] for report in reports}
    layer, losses = {"rotate", "norm", "gate"}, {"loss", "gradient"}
    assert families == {"draft", "verify", "score", "official", "compact", "greedy", "residual"} | layer | losses
    assert any(report["tensor_core"] for report in reports)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_all_variants_compile(arch):
    assert len(check("--arch", arch)) > 50
