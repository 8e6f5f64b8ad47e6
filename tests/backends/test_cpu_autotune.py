"""Which products a processor uses: chosen once by whole steps, and kept."""

from __future__ import annotations

import json

import pytest
import torch

from bdcli.backends.cpu.machine import support
from bdcli.backends.select import pick_backend, torch_backend
from bdcli.base.progress import SILENT
from bdcli.cache.selection import Full
from tests.support.backends import drafter
from tests.support.cli import compiled_only
from tests.support.compiled import FRESH, SHAPES
from tests.support.models import tiny_model

pytestmark = compiled_only


def runner(backend, model, selection, capacity):
    return drafter(backend, model, selection, capacity).runner


def test_products_are_chosen_once_by_whole_steps_and_kept(monkeypatch, tmp_path):
    from bdcli.backends.cpu import amx
    from bdcli.backends.cpu import autotune as choice
    from bdcli.backends.cpu import tables as layout

    if not amx.available():
        pytest.skip("no matrix tiles here")
    monkeypatch.setattr(choice, "code_folder", lambda: tmp_path)
    monkeypatch.setattr(choice, "_known", {})
    ids, texts = torch.randint(41, (70,), generator=FRESH).tolist(), []
    for times in (None, dict(zip(choice.CHOICES, ([1, 9], [1.02, 5], [1.01, 6], [1.1, 2])))):
        if times:  # as another process finds it
            (shape,) = choice._known
            entry = {"tries": 1, "ms": {name: [[t, t] for t in each] for name, each in times.items()}}
            (tmp_path / choice.FILE).write_text(json.dumps({shape: entry}))
            monkeypatch.setattr(choice, "_known", {})
        model = tiny_model(**SHAPES[0], seed=8, spread=0.15, dtype=torch.bfloat16)
        fast, plain = (
            runner(e, model, Full(), 90) for e in (pick_backend("compiled", [model], SILENT), torch_backend())
        )
        for each in (fast, plain):
            each.prefill(ids)
        texts.append(fast.feed([1, 2, 3], 3))
        assert fast.length == 73 and fast.cache.peak_entries == 73  # measuring left no trace
        assert (texts[-1] - plain.feed([1, 2, 3], 3)).abs().max() < 0.1 * texts[-1].std()
        (kept,) = json.loads((tmp_path / choice.FILE).read_text()).values()
        assert kept["tries"] == 1 and kept["ms"].keys() == choice.CHOICES.keys()
        assert all(len(each) == 2 and min(t) > 0 for each in kept["ms"].values() for t in each)
        assert fast._table[layout.TILED] in choice.CHOICES.values()
    assert fast._table[layout.TILED] == choice.CHOICES["tiles in attention"]


def test_a_busy_moment_does_not_choose_products_for_good(monkeypatch, tmp_path):
    from types import SimpleNamespace

    from bdcli.backends.cpu import autotune as choice

    now, busy, ran = [0.0], [True], []
    monkeypatch.setattr(choice, "code_folder", lambda: tmp_path)
    monkeypatch.setattr(choice, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def step(bits: int, rows: int) -> None:
        ran.append(bits)
        honest = rows * (2.0 if bits == choice.CHOICES["vectors"] else 3.0)
        now[0] += honest * (1.3 ** len(ran) if busy[0] else 1.0)  # every step slower than the one before

    chosen, counts = [], []
    for busy[0] in (True, False, False):  # three processes
        monkeypatch.setattr(choice, "_known", {})
        ran.clear()
        chosen.append(choice.tiled("shape", (1, 9), step))
        counts.append(len(ran))
    assert counts == [choice.TRIALS * len(choice.CHOICES) * 2] * 2 + [0]
    assert chosen[1] == chosen[2] == choice.CHOICES["vectors"]
    busy[0] = True
    for _ in range(choice.TRIES + 2):  # always busy: measured no more than so often
        monkeypatch.setattr(choice, "_known", {})
        choice.tiled("another", (1, 9), step)
    assert json.loads((tmp_path / choice.FILE).read_text())["another"]["tries"] == choice.TRIES


def test_the_processor_decides_about_dot_products(monkeypatch):
    features = {"avx512bf16"}
    monkeypatch.setattr(support, "processor_features", lambda: features)
    for name, wanted in (("znver4", True), ("znver5", True), ("emeraldrapids", False)):
        monkeypatch.setattr("llvmlite.binding.get_host_cpu_name", lambda name=name: name)
        assert support.dots_pay() == wanted
    features.clear()
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_name", lambda: "znver3")
    assert not support.dots_pay()
