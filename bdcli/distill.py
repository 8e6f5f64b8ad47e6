"""Distil a drafter: L = L_A + λ·L_C, full and budgeted views of one text in every step, all positions supervised.

windows (corpus, ends written by the target) -> target hidden states -> views of the drafter -> loss -> step
held-out passages written by the target -> acceptance grid, before, while and after -> best drafter
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bdcli.acceptance import Cell, Passage, acceptance_cell
from bdcli.checkpoint import eos_tokens, load_model, load_tokenizer, resolve, save_model
from bdcli.config import ModelConfig
from bdcli.controller import FixedGamma
from bdcli.data import held_out_prompts, training_windows
from bdcli.decode import Pair, make_speculator
from bdcli.distill_recipe import DistillRecipe
from bdcli.errors import UserError
from bdcli.interrupt import deferred_interrupt
from bdcli.losses import HiddenTarget, head_loss
from bdcli.metrics import looped_tokens
from bdcli.model import Model
from bdcli.options import DecodeOptions
from bdcli.recipe import as_dict
from bdcli.rope import RopeTable
from bdcli.trainer import Trainer, check_room
from bdcli.view_forward import view_hidden
from bdcli.views import View, plan_view

KEPT_TARGETS_BYTES = 2**30  # hidden states of the target kept between passes over the windows
WRITING_BUDGET, WRITING_GAMMA = 512, 4  # how the undistilled drafter helps the target write


@dataclass
class Watcher:
    """Callbacks of a run; the defaults do nothing. `progress(phase, done, total, note)`, `grid(step, cells)`."""

    progress: Callable[[str, int, int, str], None] = lambda *_: None
    grid: Callable[[int, list[Cell]], None] = lambda *_: None


@dataclass(frozen=True)
class Outcome:
    """`status` is done or interrupted; `stopped` says why training ended before its last step, if it did."""

    status: str
    stopped: str | None
    initial: Path
    checkpoint: Path
    before: list[Cell]
    after: list[Cell]
    steps: int
    best_step: int
    skipped: int
    dropped: dict[str, int]
    positions_per_target_token: float
    tokens_per_second: float


class Distillation:
    """One run in the folder `out`; every phase leaves a file there and is not done twice."""

    def __init__(self, recipe: DistillRecipe, out: Path, watcher: Watcher, deadline: float = math.inf):
        self.recipe, self.out, self.watcher, self.deadline = recipe, out, watcher, deadline
        self.folders = resolve(recipe.target, "target"), resolve(recipe.drafter, "drafter")
        cpu = torch.device("cpu")
        self.tokenizer = load_tokenizer(self.folders[0])
        self.target, self.drafter = (load_model(folder, torch.float32, cpu) for folder in self.folders)
        longest = max(recipe.data.context, *recipe.evaluation.contexts) + recipe.evaluation.new_tokens
        for role, model in (("target", self.target), ("drafter", self.drafter)):
            if longest > model.config.max_position:
                raise UserError(
                    f"the recipe needs {longest} positions, the {role} has {model.config.max_position}",
                    "Lower data.context or evaluation.contexts",
                )
        out.mkdir(parents=True, exist_ok=True)
        check_room(out, self.disk_bytes)
        self.key = _digest(as_dict(recipe), *map(_fingerprint, self.folders))
        self._hidden: dict[int, Tensor] = {}
        self._rope: dict[ModelConfig, RopeTable] = {}

    def plan(self) -> Iterator[str]:
        """What the run will do and what it needs, in lines."""
        r, views = self.recipe, len(self.draw_views(0))
        tokens = r.optimizer.windows_per_step * r.data.context
        written = round(r.data.written * r.data.windows) * r.data.written_tokens
        written += r.evaluation.passages * len(r.evaluation.contexts) * r.evaluation.new_tokens
        sizes = [f"{sum(t.numel() for t in m.tensors()) / 1e6:.1f} M parameters" for m in (self.target, self.drafter)]
        yield f"target {r.target} ({sizes[0]}), drafter {r.drafter} ({sizes[1]})"
        yield f"the target writes {written} tokens: ends of training windows and held-out passages"
        yield f"{r.optimizer.steps} steps × {tokens} tokens × {views} views: {views} supervised positions per token"
        hidden = r.data.windows * r.data.context * self.target.config.hidden_size * 4
        activations = 64 * views * r.data.context * self.drafter.config.hidden_size * len(self.drafter.layers)
        memory = (
            self.target.weight_bytes + 4 * self.drafter.weight_bytes + min(hidden, KEPT_TARGETS_BYTES) + activations
        )
        yield f"memory about {memory / 1e9:.1f} GB, disk {self.disk_bytes / 1e6:.0f} MB in {self.out}"

    @property
    def disk_bytes(self) -> int:
        """State with optimizer moments, two drafters, and the windows."""
        return 4 * self.drafter.weight_bytes + 4 * self.recipe.data.windows * self.recipe.data.context

    # -- phases

    def run(self, resume: bool) -> Outcome:
        """All of it. Ctrl-C or the deadline ends training after the current step with the state saved."""
        state = self.out / "state.pt"
        if state.exists() and not resume:
            raise UserError(f"{self.out} holds an earlier run", "Go on with --resume, or give another --out")
        started = time.monotonic()
        windows, dropped = self.windows()
        passages = self.passages()
        initial, best = self.out / "initial", self.out / "drafter"
        if not initial.exists():
            save_model(self.drafter, self.folders[1], initial)
        trainer = Trainer(self.drafter, self.recipe.optimizer)
        if state.exists():
            trainer.load(state, self.key)
        p = trainer.progress
        last_grid = time.monotonic()
        if not p.history:
            self._measure(trainer, passages, best)
        grid_s = time.monotonic() - last_grid
        trained_s, stopped = 0.0, None
        with deferred_interrupt() as interrupted:
            while p.step < self.recipe.optimizer.steps:
                began = time.monotonic()
                loss = trainer.step(self._micro_batches(windows, p.step))
                p.tokens += self.recipe.optimizer.windows_per_step * self.recipe.data.context
                trained_s += time.monotonic() - began
                self.watcher.progress("distil", p.step, self.recipe.optimizer.steps, f"loss {loss:.3f}")
                late = time.monotonic() + 1.5 * grid_s + (time.monotonic() - began) > self.deadline
                stopped = "interrupted" if interrupted else "out of time" if late else None
                if stopped:
                    break
                if p.step % self.recipe.evaluation.every == 0 and p.step < self.recipe.optimizer.steps:
                    self._measure(trainer, passages, best)
                    trainer.save(state, self.key)
        if not stopped or stopped == "out of time":
            self._measure(trainer, passages, best)
        trainer.save(state, self.key)
        rows = self.recipe.optimizer.windows_per_step * self.recipe.data.context
        steps_here = max(1, round(p.tokens / rows)) if trained_s else 0
        grids = {h["step"]: [Cell(**c) for c in h["cells"]] for h in p.history}
        return Outcome(
            status="interrupted" if stopped == "interrupted" else "done",
            stopped=stopped,
            initial=initial,
            checkpoint=best,
            before=grids[0],
            after=grids[p.best_step],
            steps=p.step,
            best_step=p.best_step,
            skipped=p.skipped,
            dropped=dropped,
            positions_per_target_token=float(len(self.draw_views(0))),
            tokens_per_second=steps_here * rows / trained_s if trained_s and started else 0.0,
        )

    def windows(self) -> tuple[Tensor, dict[str, int]]:
        """Training windows [n, T] int32 and how many written ends were dropped, by reason; made once."""
        path = self.out / "windows.pt"
        d = self.recipe.data
        key = _digest(asdict(d), self.recipe.seed, self.recipe.temperature, *map(_fingerprint, self.folders))
        saved = _load(path, key)
        if saved is None:
            rows = training_windows(self.tokenizer, d.sources, d.context, d.windows, self.recipe.seed)
            saved = {"key": key, "rows": torch.tensor(rows, dtype=torch.int32), "done": 0, "loops": 0, "short": 0}
        rng = random.Random(self.recipe.seed)
        warmth = self.recipe.temperature if d.written_temperature is None else d.written_temperature
        chosen = sorted(rng.sample(range(d.windows), round(d.written * d.windows)))
        while saved["done"] < len(chosen):
            row = saved["rows"][chosen[saved["done"]]]
            prompt = row[: -d.written_tokens].tolist()
            text = self._write(prompt, d.written_tokens, warmth, seed=chosen[saved["done"]])
            if len(text) < d.written_tokens:
                saved["short"] += 1
            elif sum(looped_tokens(prompt, text)) > d.max_loop_rate * len(text):
                saved["loops"] += 1
            else:
                row[-d.written_tokens :] = torch.tensor(text, dtype=torch.int32)
            saved["done"] += 1
            self.watcher.progress("the target writes", saved["done"], len(chosen), f"{saved['loops']} looped")
            if saved["done"] % 8 == 0 or saved["done"] == len(chosen):
                _save(saved, path)
        if not path.exists():
            _save(saved, path)
        return saved["rows"], {
            "read": d.windows,
            "written": len(chosen),
            "loops": saved["loops"],
            "short": saved["short"],
        }

    def passages(self) -> list[Passage]:
        """Held-out prompts, all contexts of one ending at the same token, and what the target writes; made once."""
        path, e = self.out / "passages.json", self.recipe.evaluation
        key = _digest(asdict(e), self.recipe.data.sources, self.recipe.temperature, _fingerprint(self.folders[0]))
        if path.exists():
            saved = json.loads(path.read_text("utf-8"))
            if saved["key"] == key:
                return [
                    Passage(p["dataset"], tuple(p["prompt"]), tuple(p["text"]), p["limit"]) for p in saved["passages"]
                ]
        longest = max(e.contexts)
        prompts = held_out_prompts(self.tokenizer, self.recipe.data.sources, longest, e.passages)
        found, total = [], len(prompts) * len(e.contexts)
        for n, (dataset, ids) in enumerate(prompts):
            for context in e.contexts:
                text = self._write(ids[longest - context :], e.new_tokens, self.recipe.temperature, seed=n)
                found.append(Passage(dataset, tuple(ids[longest - context :]), tuple(text), e.new_tokens))
                self.watcher.progress("held-out passages", len(found), total, "")
        _write_text(path, json.dumps({"key": key, "passages": [asdict(p) for p in found]}))
        return found

    def _write(self, prompt: list[int], tokens: int, temperature: float, seed: int) -> list[int]:
        """What the target writes after `prompt`, sped up by the undistilled drafter."""
        options = DecodeOptions(
            budget=WRITING_BUDGET,
            gamma=WRITING_GAMMA,
            temperature=temperature,
            seed=seed,
            max_new_tokens=tokens,
            device="cpu",
        )
        pair = Pair(self.target, self.drafter, self.tokenizer, eos_tokens(self.folders[0]), ("", ""))
        engine = make_speculator(pair, options, len(prompt))
        engine.prefill(prompt)
        for _ in engine.rounds(tokens, pair.eos, FixedGamma(WRITING_GAMMA)):
            pass
        return engine.new_tokens

    # -- one step

    def draw_views(self, step: int) -> list[View | None]:
        """Views of a step: the full one first; a function of (seed, step)."""
        v, rng = self.recipe.views, random.Random(f"{self.recipe.seed}/{step}")
        if v.mode == "full":
            return [None]
        if v.mode == "sampled":
            budgets = rng.choices(v.budgets, v.weights or None)
        else:
            low, high = min(v.budgets), max(v.budgets)
            budgets = [low, high, round(math.exp(rng.uniform(math.log(low), math.log(high))))]
        context = self.recipe.data.context
        return [None, *(plan_view(b, "window", v.positions, None, context) for b in budgets)]

    def order(self, step: int) -> list[int]:
        """Windows of a step: each pass over the data is a permutation of its own."""
        per, n = self.recipe.optimizer.windows_per_step, self.recipe.data.windows
        places = range(step * per, (step + 1) * per)
        return [random.Random(f"{self.recipe.seed}:{at // n}").sample(range(n), n)[at % n] for at in places]

    def _micro_batches(self, windows: Tensor, step: int) -> list[Callable[[], Tensor]]:
        views, picked = self.draw_views(step), self.order(step)
        return [lambda w=w: self.loss(windows[w].long(), w, views, len(picked)) for w in picked]

    def loss(self, ids: Tensor, window: int, views: Sequence[View | None], share: int) -> Tensor:
        """(L_A + λ·L_C) / share of one window: means over its positions, L_C a mean over the sparse views as well."""
        hidden = self.target_hidden(ids, window)
        x = view_hidden(self.drafter, self.rope(self.drafter, len(ids)), ids, views)
        x = F.rms_norm(x, x.shape[-1:], self.drafter.norm, self.drafter.config.norm_eps)
        weights = torch.ones(x.shape[:-1])
        weights[1:] = self.recipe.loss.sparse_weight / max(1, len(views) - 1)
        target = HiddenTarget(hidden, self.target.head)
        settings = self.recipe.loss
        loss, _ = head_loss(
            x, self.drafter.head, target, settings.kind, settings.temperature, weights, float(len(ids) * share)
        )
        return loss

    @torch.no_grad()
    def target_hidden(self, ids: Tensor, window: int) -> Tensor:
        """The target's normed last hidden states [T, hidden]; kept between passes while memory allows."""
        if window in self._hidden:
            return self._hidden[window]
        x = view_hidden(self.target, self.rope(self.target, len(ids)), ids, [None])[0]
        x = F.rms_norm(x, x.shape[-1:], self.target.norm, self.target.config.norm_eps)
        if (len(self._hidden) + 1) * x.numel() * x.element_size() <= KEPT_TARGETS_BYTES:
            self._hidden[window] = x
        return x

    def rope(self, model: Model, length: int) -> RopeTable:
        config = model.config
        if config not in self._rope:
            self._rope[config] = RopeTable(config.rope, length, length, model.dtype, model.device)
        return self._rope[config]

    # -- measuring

    def grid(self, passages: Sequence[Passage]) -> list[Cell]:
        """Acceptance of every context and budget of the recipe."""
        e, positions = self.recipe.evaluation, self.recipe.views.positions
        return [
            acceptance_cell(self.drafter, group, None if budget == "full" else budget, "window", positions, e.gamma)
            for group in _by_context(passages)
            for budget in e.budgets
        ]

    def _measure(self, trainer: Trainer, passages: Sequence[Passage], best: Path) -> None:
        """Add a grid to the history; keep the drafter when its mean acceptance over the budgets is the best yet."""
        p = trainer.progress
        if p.history and p.history[-1]["step"] == p.step:
            return
        cells = self.grid(passages)
        p.history.append({"step": p.step, "cells": [asdict(c) for c in cells]})
        sparse = [c.acceptance_rate or 0.0 for c in cells if c.budget != "full"] or [
            c.acceptance_rate or 0.0 for c in cells
        ]
        score = sum(sparse) / len(sparse)
        if score > p.best:
            p.best, p.best_step = score, p.step
            save_model(self.drafter, self.folders[1], best)
        self.watcher.grid(p.step, cells)


def _by_context(passages: Sequence[Passage]) -> Iterator[list[Passage]]:
    for key in dict.fromkeys((p.dataset, len(p.prompt)) for p in passages):
        yield [p for p in passages if (p.dataset, len(p.prompt)) == key]


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _fingerprint(folder: Path) -> str:
    """Changes when the model does: config and the first and last MiB of the weights, with their sizes."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()


def _load(path: Path, key: str) -> dict | None:
    if not path.exists():
        return None
    try:
        saved = torch.load(path, weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise their own
        raise UserError(f"{path} is damaged ({type(error).__name__})", "Remove it to make it again") from None
    if saved["key"] != key:
        raise UserError(f"{path} was made for another recipe or model", "Give another --out")
    return saved


def _save(saved: dict, path: Path) -> None:
    fresh = path.with_suffix(".new")
    torch.save(saved, fresh)
    fresh.replace(path)


def _write_text(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(text, "utf-8")
    fresh.replace(path)
