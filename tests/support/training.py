"""Recipes that train in seconds, texts for them, and what their runs leave behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from bdcli.base.progress import Progress
from bdcli.cache.kinds import TORCH_CACHES
from bdcli.cache.selection import CacheSize
from bdcli.config.distill import Data, DistillRecipe, Evaluation, Optimizer, Views
from bdcli.config.pretrain import Corpus as Mix
from bdcli.config.pretrain import HeldOut, MuonUpdates, PretrainRecipe, Schedule, Shape
from bdcli.data.synthetic import recall_documents
from bdcli.model.checkpoint import load_model

SMALL_DISTILL = DistillRecipe(
    data=Data(context=192, windows=5, written=0.4, written_tokens=32),
    views=Views(budgets=(40, 100)),
    optimizer=Optimizer(steps=6, lr=2e-3, warmup=2),
    precision="float32",
    evaluation=Evaluation(every=3, contexts=(64, 128), budgets=(40, 100, "full"), passages=3, new_tokens=24),
)


def small_pretrain(text: Path, **changes) -> PretrainRecipe:
    """A model of two layers, trained on the texts of a folder."""
    recipe = PretrainRecipe(
        corpus=Mix((str(text),)),
        shape=Shape(
            layers=2, hidden_size=32, intermediate_size=64, heads=2, kv_heads=1, max_position=1024, vocab_size=300
        ),
        schedule=Schedule(tokens=8192, contexts=(128, 512), shares=(0.5, 0.5), tokens_per_step=512, micro_tokens=256),
        optimizer=MuonUpdates(lr=1e-2, vector_lr=1e-2),
        held_out=HeldOut((str(text),), (512,), 2, every=6),
        precision="float32",
    )
    return replace(recipe, **changes)


def write_texts(folder: Path, count: int = 12, characters: int = 6000) -> Path:
    """`folder` with `count` small texts."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, body in recall_documents(count, characters):
        (folder / f"{name.replace(':', '')}.txt").write_text(body, "utf-8")
    return folder


def weights_of(folder: Path) -> list[torch.Tensor]:
    return load_model(folder, torch.float32, torch.device("cpu")).tensors()


def same_weights(a: Path, b: Path) -> bool:
    """Two model folders hold the same numbers."""
    return all(torch.equal(x, y) for x, y in zip(weights_of(a), weights_of(b), strict=True))


def adds_up(accounts: dict) -> bool:
    """Everything that was read is accounted for, and something was read."""
    fates = accounts["kept"] + sum(accounts["dropped"].values()) + accounts["failed"]
    return accounts["read"] == fates > 0


def cache_of(model, selection, prompt: int, total: int):
    """The cache that decoding gives a drafter: for `prompt` tokens read before the first round, `total` in all."""
    return selection.cache(TORCH_CACHES, model, CacheSize(prompt, total, total))


class Figures(Progress):
    """Collects (step and tokens, rows) of everything that is measured."""

    def __init__(self):
        self.found: list[tuple[dict, list]] = []

    def measured(self, rows, **at) -> None:
        self.found.append((at, list(rows)))


class Notes(Progress):
    """Collects lines for people."""

    def __init__(self):
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


class Stop(Exception):
    """Raised by `StopAt`."""


class StopAt(Progress):
    """Ends a run from within, where a phase has done so much of its work."""

    def __init__(self, phase: str, done: int):
        self._phase, self._done = phase, done

    def advance(self, phase: str, done: float, total: float, detail: str = "") -> None:  # noqa: ARG002
        if (phase, done) == (self._phase, self._done):
            raise Stop
