"""Pretrain a small Llama-architecture model: token streams -> windows -> next-token loss -> steps, in stages of length.

For people whose model has no small sibling: the pocket target, and a drafter to start distilling from, are made so.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bdcli.base.devices import pick_device, training_dtype
from bdcli.base.errors import UserError
from bdcli.base.files import check_disk_space, digest
from bdcli.base.interrupt import deferred_interrupt
from bdcli.base.progress import SILENT, Progress
from bdcli.config.loader import as_dict
from bdcli.config.pretrain import PretrainRecipe
from bdcli.data.corpus import Corpus, make_corpus, ordinary_ids
from bdcli.data.sources import documents, measured_windows, missing_sources
from bdcli.model.build import random_model, write_first_layers
from bdcli.model.checkpoint import (
    fingerprint,
    load_model,
    load_tokenizer,
    read_config,
    resolve,
    save_model,
)
from bdcli.train.estimate import BACKWARD, duration, forward_operations, speed, weights
from bdcli.train.forward import causal_block
from bdcli.train.held_out import Measured, measure, next_token_rows
from bdcli.train.losses import ArgmaxTarget, head_loss
from bdcli.train.optimizers import trapezoid
from bdcli.train.pretrain.copying import WEIGHT, guide_loss, lesson
from bdcli.train.pretrain.start import copy_tokenizer, write_config, write_tokenizer
from bdcli.train.trainer import Trainer

STATE = "state.pt"
TOKENIZER_TEXT = 20_000_000  # characters a tokenizer is trained on


@dataclass(frozen=True)
class Pretrained:
    """`status` is done or interrupted; `stopped` says why training ended before its last token, if it did."""

    status: str
    stopped: str | None
    checkpoint: Path
    before: list[Measured]
    after: list[Measured]
    steps: int
    tokens: int
    skipped: int
    tokens_per_second: float


class Pretraining:
    """One run in the folder `out`. Nothing is written before `run` is called."""

    def __init__(
        self,
        recipe: PretrainRecipe,
        out: Path,
        progress: Progress = SILENT,
        minutes: float | None = None,
    ):
        self.recipe, self.out, self.progress = recipe, out, progress
        self.began, self.limit_s = time.monotonic(), math.inf if minutes is None else 60 * minutes
        self.device = pick_device(recipe.device)
        self.dtype = training_dtype(recipe.precision, self.device)
        self.init = None if recipe.init is None else resolve(recipe.init, "target")
        self.shape = recipe.shape if self.init is None else read_config(self.init)
        if recipe.layers is not None:
            self.shape = replace(self.shape, layers=recipe.layers)
        if recipe.corpus.guide and self.shape.layers < 2:
            raise UserError("corpus.guide needs a model of two layers or more", "Raise layers, or set it to 0")
        if recipe.schedule.follow == "time" and minutes is None:
            raise UserError("schedule.follow: time needs a limit", "Give --max-minutes, or follow tokens")

    def plan(self) -> Iterator[str]:
        """What the run will do and what it needs, in lines."""
        r, s, size = self.recipe, self.recipe.schedule, weights(self.shape)
        stages = ", ".join(f"{share:.0%} at {c}" for share, c in zip(_normed(s.shares), s.contexts))
        yield f"{'from nothing' if self.init is None else f'from {r.init}'}; {', '.join(r.corpus.sources)}"
        yield f"at most {s.tokens / 1e6:.1f} M tokens, {s.tokens_per_step} a step: {stages}; {s.follow} set the rate"
        rows = max(s.micro_tokens, *s.contexts)
        activations = rows * self.shape.layers * (40 * self.shape.hidden_size + 16 * self.shape.intermediate_size)
        memory, kind = 16 * size + activations, str(self.dtype).removeprefix("torch.")
        yield f"{size / 1e6:.1f} M parameters on {self.device} in {kind}, memory about {memory / 1e9:.1f} GB"
        seen = sum(share * context for share, context in zip(_normed(s.shares), s.contexts)) / 2
        operations = BACKWARD * forward_operations(self.shape, s.tokens, seen)
        seconds = operations / speed(self.shape, self.dtype, self.device)
        yield f"all of it takes about {duration(seconds)} here, disk {self.disk_bytes / 1e6:.0f} MB in {self.out}"

    @property
    def disk_bytes(self) -> int:
        """Token streams, and the state with optimizer moments."""
        return 4 * self.recipe.schedule.tokens + 18 * weights(self.shape)

    def run(self, resume: bool) -> Pretrained:
        """All of it. Ctrl-C or the deadline ends training after the current step with the state saved."""
        state = self.out / STATE
        if state.exists() and not resume:
            raise UserError(f"{self.out} holds an earlier run", "Continue it with --resume, or give another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        check_disk_space(self.out, self.disk_bytes)
        start = self._start()
        tokenizer = load_tokenizer(start)
        vocabulary = digest([sorted(tokenizer.get_vocab().items())])
        self.model = load_model(start, torch.float32, self.device)
        self._check_positions()
        self._ordinary = ordinary_ids(tokenizer)
        corpus = make_corpus(self.recipe, tokenizer, vocabulary, self.out / "tokens.pt", self.progress)
        self._held = self._held_out(tokenizer)
        trainer = Trainer(self.model, self.recipe.optimizer)
        kept = as_dict(replace(self.recipe, checkpoint_minutes=0))
        key = digest([kept, fingerprint(start)])
        if state.exists():
            trainer.load(state, key)
        stopped, rate = self._train(trainer, corpus, start, key)
        p = trainer.state
        measured = [[Measured(**m) for m in entry["measured"]] for entry in p.history]
        return Pretrained(
            status="interrupted" if stopped == "interrupted" else "done",
            stopped=stopped,
            checkpoint=self.out / "model",
            before=measured[0],
            after=measured[-1],
            steps=p.step,
            tokens=p.tokens,
            skipped=p.skipped,
            tokens_per_second=rate,
        )

    def _start(self) -> Path:
        """Folder of the model that training starts from: `init`, one of another depth, or one made from nothing."""
        if self.init is not None and self.recipe.layers is None:
            return self.init
        folder = self.out / "start"
        if folder.exists():
            return folder
        if self.init is not None:
            write_first_layers(self.init, folder, self.recipe.layers, self.recipe.seed)
            return folder
        r, half = self.recipe, self.out / "start.like"
        half.mkdir(exist_ok=True)
        if r.tokenizer is not None:
            copy_tokenizer(resolve(r.tokenizer, "target"), half)
        else:
            write_tokenizer(half, _some_text(r.corpus.sources), r.shape.vocab_size)
        tokenizer = load_tokenizer(half)
        config = write_config(half, r.shape, len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
        save_model(random_model(config, r.seed), half, folder)
        return folder

    def _check_positions(self) -> None:
        s, held = self.recipe.schedule, self.model.config.max_position
        longest = max(*s.contexts, *self.recipe.held_out.contexts, s.reach)
        if longest > held:
            raise UserError(f"the recipe needs {longest} positions, the model has {held}", "Lower contexts and reach")

    def _held_out(self, tokenizer) -> Tensor:
        h = self.recipe.held_out
        sources = h.sources or self.recipe.corpus.sources
        found = measured_windows(tokenizer, sources, max(h.contexts), h.documents, bool(h.sources))
        return torch.tensor(found)

    # -- training

    def _train(self, trainer: Trainer, corpus: Corpus, start: Path, key: str) -> tuple[str | None, float]:
        """Steps until the tokens are read. Returns why it stopped early, or None, and tokens a second of steps."""
        p, s, r = trainer.state, self.recipe.schedule, self.recipe
        p.cursor = p.cursor or [0] * len(corpus.streams)
        earlier_s, first = p.elapsed_s, p.tokens
        trained_s, stopped, saved_at = 0.0, None, time.monotonic()
        final_s = self._measure(trainer, r.held_out.contexts) if not p.history else 0.0
        block = torch.compile(causal_block, dynamic=False) if r.compile else causal_block
        with deferred_interrupt() as interrupt:
            while p.tokens < s.tokens and not stopped:
                began = time.monotonic()
                p.elapsed_s = earlier_s + began - self.began
                done = self.share(p.tokens, p.elapsed_s, earlier_s + self.limit_s - 1.5 * final_s)
                if done >= 1:
                    stopped = "out of time"
                    break
                context = self.stage(done)
                windows = corpus.take(p.cursor, context, max(1, s.tokens_per_step // context)).to(self.device)
                shown = lesson(r.seed, p.step, self._ordinary).to(self.device) if done < r.corpus.guide else None
                parts = partial(self._parts, windows, block, skipped(context, s.reach, r.seed, p.step), shown)
                loss = trainer.step(parts, trapezoid(done, s.warmup, s.decay))
                p.tokens += windows.numel()
                step_s = time.monotonic() - began
                trained_s += step_s
                left = f", {(1 - done) * p.elapsed_s / done / 60:.0f} min left" if done > 0 else ""
                said = f"loss {loss:.3f}, context {context}, {windows.numel() / step_s:.0f} tok/s{left}"
                self.progress.advance("pretrain", min(p.tokens, s.tokens), s.tokens, said)
                if interrupt.requested:
                    stopped = "interrupted"
                elif time.monotonic() - self.began + 1.5 * step_s + 1.2 * final_s > self.limit_s:
                    stopped = "out of time"
                elif p.step % r.held_out.every == 0:
                    self._measure(trainer, (min(r.held_out.contexts),))
                if time.monotonic() - saved_at > 60 * r.checkpoint_minutes and not stopped:
                    self._save(trainer, start, key)
                    saved_at = time.monotonic()
            if stopped != "interrupted":
                self._measure(trainer, r.held_out.contexts)
            self._save(trainer, start, key)
        return stopped, (p.tokens - first) / trained_s if trained_s else 0.0

    def share(self, tokens: int, elapsed_s: float, horizon_s: float) -> float:
        """Share of the run that is done: by tokens, or by the clock where that is further and the recipe says so."""
        s, done = self.recipe.schedule, tokens / self.recipe.schedule.tokens
        return max(done, elapsed_s / max(1.0, horizon_s)) if s.follow == "time" else done

    def stage(self, done: float) -> int:
        """Window length when `done` of the run is behind."""
        ends, s = 0.0, self.recipe.schedule
        for share, context in zip(_normed(s.shares), s.contexts):
            ends += share
            if done < ends:
                return context
        return s.contexts[-1]

    def _save(self, trainer: Trainer, start: Path, key: str) -> None:
        trainer.save(self.out / STATE, key)
        save_model(self.model, start, self.out / "model")

    def _parts(
        self, windows: Tensor, block, positions: Tensor, shown: Tensor | None, pieces: int
    ) -> list[Callable[[], Tensor]]:
        rows = max(1, self.recipe.schedule.micro_tokens // windows.shape[1] // pieces)
        parts = [partial(self.loss, w, windows.shape[0], block, positions) for w in windows.split(rows)]
        return parts if shown is None else [*parts, lambda: WEIGHT * guide_loss(self.model, shown, self.dtype)]

    def loss(self, windows: Tensor, of: int, block=causal_block, positions: Tensor | None = None) -> Tensor:
        """Share of windows [N, T] in the mean next-token cross-entropy of `of` windows."""
        x, following = next_token_rows(self.model, windows, self.dtype, block, positions)
        share = of * (windows.shape[1] - 1)
        return head_loss(x, self.model.head, ArgmaxTarget(following), "ce", denominator=float(share))[0]

    # -- measuring

    def _measure(self, trainer: Trainer, contexts: tuple[int, ...]) -> float:
        """Add held-out losses of this step to the history. Returns seconds taken."""
        p, began = trainer.state, time.monotonic()
        if p.history and p.history[-1]["step"] == p.step:
            if len(p.history[-1]["measured"]) == len(contexts):
                return 0.0
            p.history.pop()
        found = []
        for n, context in enumerate(contexts):
            found.append(measure(self.model, self._held, context, self.dtype))
            self.progress.advance("held-out loss", n + 1, len(contexts), f"{found[-1].nll:.3f} at {context}")
        p.history.append({"step": p.step, "tokens": p.tokens, "measured": [asdict(m) for m in found]})
        self.progress.measured(found, step=p.step, tokens=p.tokens)
        return time.monotonic() - began


def skipped(length: int, reach: int, seed: int, step: int) -> Tensor:
    """Positions [length] of the windows of one step: 0.. in order, with at most one gap, all below max(length, reach).

    Positional skip-wise training (PoSE, Zhu et al. 2023): short windows teach distances of up to `reach`. Half the
    steps skip nothing; the others skip log-uniformly many positions at a uniform place.
    """
    rng, positions = random.Random(f"skip {seed} {step}"), torch.arange(length)
    if reach > length and rng.random() < 0.5:
        gap = int(math.exp(rng.uniform(0, math.log(reach - length))))
        positions[rng.randrange(1, length) :] += gap
    return positions


def missing_inputs(recipe: PretrainRecipe) -> Iterator[tuple[str, str]]:
    """(key, message) of models and data that a recipe names and that are not here."""
    for key in ("init", "tokenizer"):
        if getattr(recipe, key) is not None:
            try:
                load_tokenizer(resolve(getattr(recipe, key), "target"))
            except UserError as error:
                yield key, str(error)
    for key, sources in (("corpus.sources", recipe.corpus.sources), ("held_out.sources", recipe.held_out.sources)):
        yield from ((key, problem) for problem in missing_sources(sources))


def _normed(shares: tuple[float, ...]) -> list[float]:
    return [share / sum(shares) for share in shares]


def _some_text(sources: tuple[str, ...]) -> Iterator[str]:
    """About TOKENIZER_TEXT characters of training documents, the same amount of each source."""
    for source in sources:
        room = TOKENIZER_TEXT // len(sources)
        for doc in documents(source):
            if doc.held_out:
                continue
            yield doc.text[:room]
            room -= len(doc.text)
            if room <= 0:
                break
