"""The comparisons of test_device.py on CPU, in Triton's interpreter.

It must be chosen before triton is imported, so each operation's tests run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

OPERATIONS = ["draft_attention", "verify_attention", "chunk or choice", "layer", "head_loss", "accept"]


def run(operation, marks):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", operation, "-m", marks]
    command.append(str(Path(__file__).with_name("test_device.py")))
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout[-20_000:], done.stderr[-5_000:])  # a failure names its seed there
    assert done.returncode == 0
    assert " passed" in done.stdout


@pytest.mark.parametrize("operation", OPERATIONS)
def test_interpreted_kernels_match_their_twins(operation):
    run(operation, "gpu and not slow")


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS[:2])
def test_all_interpreted_variants_match_their_twins(operation):
    run(operation, "gpu and slow")


def test_the_self_check_of_doctor_tells_a_broken_kernel_from_sound_ones():
    broken = (
        "import sys; from bd_kernels import between, self_check; sound = between.gate;"
        "between.gate = lambda x: sound(x) * 1.1; sys.argv[1:] = ['--device', 'cpu']; sys.exit(self_check.main())"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", broken], env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr[-5_000:])
    assert done.returncode == 1 and done.stdout.count(" ok ") == 9
    assert [line.split()[0] for line in done.stdout.splitlines() if "FAULT" in line] == ["gate"]
