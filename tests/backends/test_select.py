"""The choice of a backend, its threads, and what it holds in memory."""

from __future__ import annotations

import os
import re
import threading
import time

import pytest
import torch

from bdcli.backends.cpu.machine import support
from bdcli.backends.select import pick_backend, torch_backend
from bdcli.base.errors import UserError
from bdcli.base.progress import SILENT
from bdcli.cache.budget import BudgetCache
from bdcli.cache.full import FullCache
from bdcli.cache.official import OfficialCache
from tests.support.cli import compiled_only
from tests.support.compiled import SHAPES
from tests.support.models import tiny_model

pytestmark = compiled_only


def test_the_choice_of_engine_is_explained(monkeypatch):
    fits, odd = tiny_model(**SHAPES[0]), tiny_model()
    assert pick_backend("auto", [fits], SILENT).name == "compiled"
    assert pick_backend("torch", [fits], SILENT).name == "torch"
    engine = pick_backend("auto", [fits, odd], SILENT)
    assert engine.name == "torch" and "hidden size 24 is no multiple of 32" in engine.detail
    with pytest.raises(UserError, match="--engine compiled cannot run here"):
        pick_backend("compiled", [odd], SILENT)
    half = tiny_model(**SHAPES[0], dtype=torch.float16)
    assert "float16" in pick_backend("auto", [half], SILENT).detail
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "aarch64" in pick_backend("auto", [fits], SILENT).detail


def test_threads_honour_limits(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1, 2, 3})
    for given, wanted in (("", 4), ("2", 2), ("9", 4), ("3,2", 3), ("0", 4), ("x", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert support.thread_limit() == wanted


def test_threads_are_pinned_by_request(monkeypatch):
    from bdcli.backends.cpu.pool import Pool

    allowed = os.sched_getaffinity(0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1, 2})
    assert support.processors_to_keep(3) == [None, None, None]
    monkeypatch.setenv("BDCLI_PIN", "1")
    assert support.processors_to_keep(5) == [None, 1, 2, 0, 1]
    monkeypatch.undo()
    monkeypatch.setenv("BDCLI_PIN", "1")
    before = {t.native_id for t in threading.enumerate()}
    own = Pool(2)
    (new,) = {t.native_id for t in threading.enumerate()} - before
    wanted, deadline = {sorted(allowed)[1 % len(allowed)]}, time.monotonic() + 20
    while os.sched_getaffinity(new) != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    assert os.sched_getaffinity(new) == wanted and os.sched_getaffinity(0) == allowed
    own.close()


def test_the_plain_twins_are_the_caches_of_torch():
    from bdcli.backends.cpu.caches import PANEL_CACHES

    plain = FullCache, OfficialCache, BudgetCache
    assert tuple(torch_backend().caches) == plain
    assert pick_backend("compiled", [], SILENT).caches == PANEL_CACHES
    assert all(map(issubclass, PANEL_CACHES, plain))


def test_decoding_holds_little_beside_weights_and_entries():
    import bdcli.backends.cpu.runner  # noqa: F401  (compiled by now: compiling takes memory of its own)
    from bdcli.cli.doctor import decoding_memory

    whole, weights, kv, rest = map(int, re.findall(r"(\d+)(?: MB|\b)", decoding_memory(4096)))
    assert (weights, kv) == (27, 52) and abs(whole - weights - kv - rest) <= 2
    assert rest <= 300
