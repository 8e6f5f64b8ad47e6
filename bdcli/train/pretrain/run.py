"""Pretrain a small Llama-architecture model: token streams -> windows -> next-token loss -> steps, in stages of length.

For people whose model has no small sibling: the pocket target, and a drafter to start distilling from, are made so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bdcli.base.devices import dtype_name, pick_device, training_dtype
from bdcli.base.errors import UserError
from bdcli.base.files import check_disk_space, digest, disk_size, make_folder
from bdcli.base.interrupt import deferred_interrupt
from bdcli.base.progress import SILENT, Progress
from bdcli.config.loader import as_dict
from bdcli.config.pretrain import PretrainRecipe
from bdcli.data.corpus import make_corpus, ordinary_ids
from bdcli.data.identity import sources_identity
from bdcli.data.split import held_out_windows, missing_texts
from bdcli.decode.memory import check_peak, runtime_bytes
from bdcli.model.checkpoint import fingerprint, load_model, read_config, save_model
from bdcli.model.hub import resolve
from bdcli.model.llama import Model
from bdcli.model.sizes import gigabytes
from bdcli.model.tokenizer import load_tokenizer
from bdcli.train.estimate import BACKWARD, duration, forward_operations, parameters, speed
from bdcli.train.held_out import HeldOutLoss, measure
from bdcli.train.optimizers import trapezoid
from bdcli.train.pretrain.batches import Batches
from bdcli.train.pretrain.stages import normalize, share_done
from bdcli.train.pretrain.start import start_folder
from bdcli.train.trainer import Trainer, TrainingState

STATE = "state.pt"  # file of the weights and moments that a resumed run starts from
MODEL, TOKENS = "model", "tokens.pt"  # folder of what was learned, file of the token streams
STATE_BYTES = 18  # a parameter: weights and moments in fp32; in bf16 the start, the result and the one being written


@dataclass(frozen=True)
class Pretrained:
    """`status` is done or interrupted; `stopped` says why training ended before its last token, if it did."""

    status: str
    stopped: str | None
    checkpoint: Path
    before: list[HeldOutLoss]
    after: list[HeldOutLoss]
    steps: int
    tokens: int
    skipped: int
    tokens_per_second: float


@dataclass(frozen=True)
class _Work:
    """What a run works on: the model, from the folder `start`, its batches, and held-out windows [N, T].

    key: of all that the state depends on.
    """

    start: Path
    model: Model
    batches: Batches
    held_out: Tensor
    key: str


class Pretraining:
    """One run in the folder `out`, whose clock of `minutes` starts now. Nothing is written before `run` is called.

    Raises UserError on settings that do not fit the model or the limit.
    """

    def __init__(self, recipe: PretrainRecipe, out: Path, progress: Progress = SILENT, minutes: float | None = None):
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
        r, s, size = self.recipe, self.recipe.schedule, parameters(self.shape)
        stages = ", ".join(f"{share:.0%} at {c}" for share, c in zip(normalize(s.shares), s.contexts))
        yield f"{'from nothing' if self.init is None else f'from {r.init}'}; {', '.join(r.corpus.sources)}"
        yield f"at most {s.tokens / 1e6:.1f} M tokens, {s.tokens_per_step} a step: {stages}; {s.follow} set the rate"
        kind, memory = dtype_name(self.dtype), gigabytes(self.memory_bytes)
        yield f"{size / 1e6:.1f} M parameters on {self.device} in {kind}, memory about {memory}"
        mean_keys = sum(share * context for share, context in zip(normalize(s.shares), s.contexts)) / 2
        operations = BACKWARD * forward_operations(self.shape, s.tokens, mean_keys)
        seconds = operations / speed(self.shape, self.dtype, self.device)
        yield f"all of it takes about {duration(seconds)} here, disk {disk_size(self.disk_bytes)} in {self.out}"

    @property
    def memory_bytes(self) -> int:
        """Weights, gradients and moments, and the activations of a micro-batch."""
        c, s = self.shape, self.recipe.schedule
        rows = max(s.micro_tokens, *s.contexts)
        return 16 * parameters(c) + rows * c.layers * (40 * c.hidden_size + 16 * c.intermediate_size)

    @property
    def disk_bytes(self) -> int:
        """Token streams, and the state with optimizer moments."""
        return 4 * self.recipe.schedule.tokens + STATE_BYTES * parameters(self.shape)

    def check_space(self) -> None:
        """Compare what the run needs with the memory and the disk there are.

        Raises UserError, and BdcliError where the disk does not suffice.
        """
        line, hint = f"training takes {gigabytes(self.memory_bytes)}", "Lower schedule.micro_tokens or the shape"
        check_peak(line, self.memory_bytes + runtime_bytes(self.device), self.device, hint)
        check_disk_space(self.out, self.disk_bytes)

    def run(self, resume: bool) -> Pretrained:
        """All of it. Ctrl-C or the deadline ends training after the current step with the state saved."""
        state_file = self.out / STATE
        if state_file.exists() and not resume:
            raise UserError(f"{self.out} holds an earlier run", "Continue it with --resume, or give another --out")
        make_folder(self.out)
        work = self._load()
        trainer = Trainer(work.model, self.recipe.optimizer)
        if state_file.exists():
            trainer.load(state_file, work.key)
        stopped, tokens_per_second = self._train(trainer, work)
        state = trainer.state
        grids = [[HeldOutLoss(**row) for row in entry["measured"]] for entry in state.history]
        return Pretrained(
            status="interrupted" if stopped == "interrupted" else "done",
            stopped=stopped,
            checkpoint=self.out / MODEL,
            before=grids[0],
            after=grids[-1],
            steps=state.step,
            tokens=state.tokens,
            skipped=state.skipped,
            tokens_per_second=tokens_per_second,
        )

    def _load(self) -> _Work:
        """The model and its texts, made where they are missing."""
        r = self.recipe
        start = start_folder(r, self.init, self.out)
        tokenizer = load_tokenizer(start)
        vocabulary = digest([sorted(tokenizer.get_vocab().items())])
        model = load_model(start, torch.float32, self.device)
        self._check_positions(model.config.context_limit)
        corpus = make_corpus(r, tokenizer, vocabulary, self.out / TOKENS, self.progress)
        batches = Batches(r, model, corpus, ordinary_ids(tokenizer), self.dtype)
        h = r.held_out
        sources = h.sources or r.corpus.sources
        held_out = held_out_windows(tokenizer, sources, max(h.contexts), h.documents, bool(h.sources), self.progress)
        texts = sources_identity((*r.corpus.sources, *h.sources))
        key = digest([as_dict(replace(r, checkpoint_minutes=0)), texts, fingerprint(start)])
        return _Work(start, model, batches, torch.tensor(held_out), key)

    def _check_positions(self, available: int) -> None:
        s = self.recipe.schedule
        longest = max(*s.contexts, *self.recipe.held_out.contexts, s.reach)
        if longest > available:
            raise UserError(
                f"the recipe needs {longest} positions, the model has {available}", "Lower contexts and reach"
            )

    # -- training

    def _train(self, trainer: Trainer, work: _Work) -> tuple[str | None, float]:
        """Steps until the tokens are read. Returns why it stopped early, or None, and tokens a second of steps."""
        state, s, r = trainer.state, self.recipe.schedule, self.recipe
        earlier_s, first = state.elapsed_s, state.tokens
        trained_s, stopped, saved_at = 0.0, None, time.monotonic()
        final_s = self._measure(state, work, r.held_out.contexts) if not state.history else 0.0
        with deferred_interrupt() as interrupt:
            while state.tokens < s.tokens and not stopped:
                began = time.monotonic()
                state.elapsed_s = earlier_s + began - self.began
                done = share_done(s, state.tokens, state.elapsed_s, earlier_s + self.limit_s - 1.5 * final_s)
                if done >= 1:
                    stopped = "out of time"
                    break
                batch = work.batches.draw(state, done)
                loss = trainer.step(batch.losses, trapezoid(done, s.warmup, s.decay))
                state.tokens += batch.windows.numel()
                step_s = time.monotonic() - began
                trained_s += step_s
                self._report(state, loss, batch.windows, step_s, done)
                if interrupt.requested:
                    stopped = "interrupted"
                elif time.monotonic() - self.began + 1.5 * step_s + 1.2 * final_s > self.limit_s:
                    stopped = "out of time"
                elif state.step % r.held_out.every == 0:
                    self._measure(state, work, (min(r.held_out.contexts),))
                if time.monotonic() - saved_at > 60 * r.checkpoint_minutes and not stopped:
                    self._save(trainer, work)
                    saved_at = time.monotonic()
            if stopped != "interrupted":
                self._measure(state, work, r.held_out.contexts)
            self._save(trainer, work)
        return stopped, (state.tokens - first) / trained_s if trained_s else 0.0

    def _report(self, state: TrainingState, loss: float, windows: Tensor, step_s: float, done: float) -> None:
        """Progress after a step over windows [N, T]; `done` is the share of the run before it."""
        total = self.recipe.schedule.tokens
        left = f", {(1 - done) * state.elapsed_s / done / 60:.0f} min left" if done > 0 else ""
        detail = f"loss {loss:.3f}, context {windows.shape[1]}, {windows.numel() / step_s:.0f} tok/s{left}"
        self.progress.advance("pretrain", min(state.tokens, total), total, detail)

    def _save(self, trainer: Trainer, work: _Work) -> None:
        trainer.save(self.out / STATE, work.key)
        save_model(work.model, work.start, self.out / MODEL)

    def _measure(self, state: TrainingState, work: _Work, contexts: tuple[int, ...]) -> float:
        """Add held-out losses of this step to the history. Returns seconds taken."""
        began = time.monotonic()
        if state.history and state.history[-1]["step"] == state.step:
            if len(state.history[-1]["measured"]) == len(contexts):
                return 0.0
            state.history.pop()
        losses = []
        for n, context in enumerate(contexts):
            losses.append(measure(work.model, work.held_out, context, self.dtype))
            self.progress.advance("held-out loss", n + 1, len(contexts), f"{losses[-1].nll:.3f} at {context}")
        rows = [asdict(loss) for loss in losses]
        state.history.append({"step": state.step, "tokens": state.tokens, "measured": rows})
        self.progress.measured(losses, step=state.step, tokens=state.tokens)
        return time.monotonic() - began


def missing_inputs(recipe: PretrainRecipe) -> Iterator[tuple[str, str]]:
    """(key, message) of models and data that a recipe names and that are not here."""
    for key in ("init", "tokenizer"):
        if getattr(recipe, key) is not None:
            try:
                load_tokenizer(resolve(getattr(recipe, key), "target"))
            except UserError as error:
                yield key, str(error)
    yield from missing_texts("corpus", recipe.corpus.sources, "held_out", recipe.held_out.sources)
