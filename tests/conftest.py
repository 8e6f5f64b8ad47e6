"""What several test files need: tiny random models, the pocket pair, real text, and the command line in-process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import sys
from dataclasses import dataclass

import pytest
import torch

from bdcli.checkpoint import POCKET, load_model, load_tokenizer
from bdcli.config import ModelConfig, RopeConfig
from bdcli.model import Layer, Model
from bdcli.prompts import stdlib_text

torch.set_num_threads(1)  # two xdist workers share two cores
os.environ["OMP_NUM_THREADS"] = "1"  # and so do compiled steps and the processes that tests start


compiled_only = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64", reason="compiled steps are for Linux on x86-64"
)


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    """No test touches the user's store."""
    monkeypatch.setenv("BDCLI_DB", str(tmp_path / "runs.db"))


def tiny_model(
    layers=2, heads=4, kv_heads=2, dim=8, vocab=41, seed=0, dtype=torch.float32, spread=0.35, hidden=24, inner=40,
    biases=False, qk_norm=False,
) -> Model:  # fmt: skip
    """Random weights, large enough that attention is far from uniform."""
    g = torch.Generator().manual_seed(seed)

    def weight(*shape):
        return (torch.randn(*shape, generator=g) * spread).to(dtype)

    def norm():
        return (1 + 0.1 * torch.randn(hidden, generator=g)).to(dtype)

    rope = RopeConfig("default", 10000.0, dim, 4096)
    config = ModelConfig(
        vocab, hidden, inner, layers, heads, kv_heads, dim, 4096, 1e-5, rope, False, biases, biases, biases, qk_norm,
        None,
    )  # fmt: skip
    blocks = [
        Layer(
            norm(),
            weight((heads + 2 * kv_heads) * dim, hidden),
            weight(hidden, heads * dim),
            norm(),
            weight(2 * inner, hidden),
            weight(hidden, inner),
        )
        for _ in range(layers)
    ]
    for block in blocks:
        if biases:
            for name in ("qkv", "out", "gate_up", "down"):
                setattr(block, name + "_bias", weight(getattr(block, name).shape[0]))
        if qk_norm:
            block.qk_norm = 1 + weight(heads + kv_heads, dim)
    return Model(config, weight(vocab, hidden), blocks, norm(), weight(vocab, hidden))


def p_value(counts, law) -> float:
    """Of Pearson's chi-square test of counts [N] against their law [N], which is nowhere zero."""
    counts, law = (torch.as_tensor(x).double() for x in (counts, law))
    expected = counts.sum() * law / law.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(law) - 1) / 2).double(), statistic / 2))


def fits(counts, law) -> bool:
    return p_value(counts, law) > 1e-4


def law_of_two(sampling, plain, prompt, vocab):
    """Joint law [V, V] of the two tokens after `prompt`, by plain forwards of the reader `plain`."""
    plain.prefill(prompt[:-1])
    first = sampling.distribution(plain.feed(prompt[-1:], 1))[0]
    joint = torch.zeros(vocab, vocab)
    for token in range(vocab):
        joint[token] = first[token] * sampling.distribution(plain.feed([token], 1))[0]
        plain.rollback(len(prompt))
    return joint


@pytest.fixture(scope="session")
def pocket():
    """(target, drafter, tokenizer) in fp32."""
    cpu = torch.device("cpu")
    target, drafter = (load_model(POCKET / role, torch.float32, cpu) for role in ("target", "drafter"))
    return target, drafter, load_tokenizer(POCKET / "target")


@pytest.fixture(scope="session")
def text_ids(pocket):
    """Token ids of real held-out text, enough for 16K prompts."""
    return pocket[2](stdlib_text()[:400_000], verbose=False)["input_ids"]


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture
def cli(monkeypatch):
    """Run `bdcli ...` in this process, through the real entry point."""
    from bdcli.cli import main

    def run(*args: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["bdcli", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
            main()
        return Outcome(stop.value.code or 0, out.getvalue(), err.getvalue())

    return run
