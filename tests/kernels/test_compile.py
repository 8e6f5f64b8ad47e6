"""Every kernel compiles for real architectures on a machine without a GPU, with tensor cores and without spills.

The interpreter must be off, whatever this process uses, so the check runs as the program it also is.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from bdcli.bench.shapes import parse_shape

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


PAIRS = ["llama2-7b+68m", "llama3-8b+68m", "tinyllama+68m", "llama2-7b+tinyllama", "llama3-8b+llama3-8b"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_table_has_every_variant_that_the_engine_launches(dtype):
    """Up to the group's size, which only index arithmetic sees, and how many splits there are beyond one."""
    from bd_kernels import variants
    from bd_kernels.draft_attention import draft_constants
    from bd_kernels.verify_attention import verify_constants

    def key(made):
        constants, options = made
        kept = {n: v for n, v in constants.items() if n not in ("GROUP", "SPLITS")}
        return str((sorted(kept.items()), sorted(options.items()), constants["SPLITS"] > 1))

    known = {key(draft_constants(*c[:3], c.dtype, *c[4:])) for c in variants.DRAFT + variants.ENGINE_DRAFT}
    known |= {key(verify_constants(*c[:3], c.dtype, c.splits)) for c in variants.VERIFY + variants.ENGINE_VERIFY}
    rows = [1, 2, 4, 5, 8, 9, 16, 17, 18, 32]
    missing = []
    for target, drafter in map(parse_shape, PAIRS):
        for r in rows:
            full = {"target": target, "drafter": drafter}
            launched = {
                (who, "verify", splits): verify_constants(c.head_dim, c.heads // c.kv_heads, r, dtype, splits)
                for who, c in full.items()
                for splits in (1, 8)
                if splits > 1 or r * c.heads // c.kv_heads <= 32
            } | {
                ("drafter", query, splits): draft_constants(
                    drafter.head_dim, drafter.heads // drafter.kv_heads, r, dtype, query, False, splits
                )
                for query in ("raw", "one")
                for splits in (1, 2)
            }
            missing += [(what, r) for what, made in launched.items() if key(made) not in known]
    assert not missing, missing


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_all_variants_compile(arch):
    assert len(check("--arch", arch)) > 50
