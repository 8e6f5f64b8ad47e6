"""Which products of the processor a test forces, and shapes that compiled steps take."""

from __future__ import annotations

import pytest
import torch

UNITS = {"vectors": 0, "dots": 0, "tiles": 63, "tiles in attention": 32, "some tiles": 21}  # BY_TILES bits
KINDS = [(torch.float32, "vectors"), *((torch.bfloat16, units) for units in ("vectors", "dots", "tiles"))]
FRESH = torch.Generator()
FRESH.seed()


def randn(*shape):
    return torch.randn(*shape, generator=FRESH)


def entry(name):
    from bdcli.backends.cpu import runner  # noqa: F401
    from bdcli.backends.cpu.machine import simd

    return simd.entries[name].ctypes


def force(monkeypatch, units):
    """These units of the processor multiply bf16, whatever is faster here."""
    from bdcli.backends.cpu import amx
    from bdcli.backends.cpu.machine.llvm import HAS_DOTS

    if UNITS[units] and not amx.available():
        pytest.skip("no matrix tiles here")
    if units == "dots" and not HAS_DOTS:
        pytest.skip("no dot product of bf16 here")
    monkeypatch.setattr("bdcli.backends.cpu.runner.tiled", lambda *_: UNITS[units])
    monkeypatch.setattr("bdcli.backends.cpu.runner.dots_pay", lambda: units == "dots")


SHAPES = [
    {"hidden": 64, "inner": 96, "dim": 32, "heads": 4, "kv_heads": 2},
    {"hidden": 96, "inner": 160, "dim": 64, "heads": 3, "kv_heads": 3, "biases": True, "vocab": 131},
    {"hidden": 32, "inner": 32, "dim": 96, "heads": 6, "kv_heads": 1, "qk_norm": True, "layers": 3},
    {"hidden": 64, "inner": 64, "dim": 128, "heads": 2, "kv_heads": 1, "vocab": 17},
]
