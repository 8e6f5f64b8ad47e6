"""The engine: draft, verify, accept. It knows token ids only; it yields steps, callers print and store.

A round: the drafter proposes γ tokens after everything emitted so far; the target scores the last emitted token and
the proposals in one forward; verification keeps a prefix of them and adds one token of the target's own; both caches
roll back by moving an integer. Each model is fed `ids[length:]`, so a full acceptance needs no catch-up forward.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from bdcli.cache.budget import BudgetCache
from bdcli.cache.full import FullCache
from bdcli.model.llama import Model
from bdcli.speculation.draft_length import Controller
from bdcli.speculation.sampling import Sampling, Verdict, best_tokens, check_finite, draw, verify_greedy, verify_sampled


class Runner:
    """A model with its cache. `vocab` aligns a drafter with its target, whose table of tokens may be padded otherwise:

    logits are cut or filled with -inf, and ids the model does not have are read as id 0.
    """

    def __init__(self, model: Model, cache: FullCache | BudgetCache, vocab: int | None = None):
        self.model, self.cache = model, cache
        self.vocab = vocab or model.config.vocab_size

    @property
    def length(self) -> int:
        return self.cache.length

    @property
    def exact(self) -> bool:
        """A row's logits do not depend on how many rows are read at once, up to rounding that decides nothing."""
        return self.model.dtype is torch.float32

    def prefill(self, tokens: list[int], progress=None) -> None:
        self.model.prefill(self._known(tokens), self.cache, progress)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)  # whoever times a prefill times its work

    def feed(self, tokens: list[int], rows: int) -> Tensor:
        """Append `tokens`; fp32 logits [rows, V] of the last `rows`."""
        return self.aligned(self.model.forward(self._known(tokens), self.cache, rows))

    @classmethod
    def feed_together(
        cls, runners: Sequence[Runner], tokens: Sequence[list[int]], rows: Sequence[int]
    ) -> Sequence[Tensor]:
        """`feed` of runners of one model, each with a text of its own."""
        if len(runners) == 1:
            return [runners[0].feed(tokens[0], rows[0])]
        known = [runner._known(text) for runner, text in zip(runners, tokens)]
        logits = runners[0].model.forward_together(known, [runner.cache for runner in runners], rows)
        return [runner.aligned(part) for runner, part in zip(runners, logits)]

    def aligned(self, logits: Tensor) -> Tensor:
        """Logits [T, V] of the model's own vocabulary cut or filled to the target's."""
        missing = self.vocab - logits.shape[-1]
        if missing > 0:
            return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        return logits[:, : self.vocab] if missing else logits

    def draft(
        self, ids: list[int], gamma: int, sampling: Sampling, generator: torch.Generator
    ) -> tuple[list[int], Tensor | None]:
        """`gamma` >= 1 tokens to follow `ids`, each read but the last, and, when sampling, what they were drawn from:

        q [γ, V], the serving distribution of this model.
        """
        return self.draft_together([self], [ids], [gamma], sampling, [generator])[0]

    @classmethod
    def draft_together(
        cls,
        runners: Sequence[Runner],
        ids: Sequence[list[int]],
        gammas: Sequence[int],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
    ) -> list[tuple[list[int], Tensor | None]]:
        """`draft` of runners of one model, each with a text of its own."""
        drafted: list[list[int]] = [[] for _ in runners]
        rows: list[list[Tensor]] = [[] for _ in runners]
        unread = [text[runner.length :] for runner, text in zip(runners, ids, strict=True)]
        for place in range(max(gammas)):
            going = [i for i, gamma in enumerate(gammas) if place < gamma]
            logits = cls.feed_together([runners[i] for i in going], [unread[i] for i in going], [1] * len(going))
            for i, row in zip(going, logits):
                best = best_tokens(row, "drafter")
                if sampling.greedy:
                    drafted[i] += best
                else:
                    rows[i].append(sampling.distribution(row))
                    drafted[i].append(draw(rows[i][-1][0], generators[i]))
                unread[i] = drafted[i][-1:]
        return [(tokens, torch.cat(q) if q else None) for tokens, q in zip(drafted, rows)]

    def _known(self, tokens: list[int]) -> list[int]:
        own = self.model.config.vocab_size
        return tokens if own >= self.vocab else [token if token < own else 0 for token in tokens]

    def whole_rounds(self, drafter: object, sampling: Sampling, generator: torch.Generator) -> WholeRounds | None:
        """Rounds of this target with `drafter` as one piece of work each; None where a round is made of steps."""

    def exclusive(self) -> AbstractContextManager:
        """Entered while rounds run: keeps others' threads off the processors that this runner's work needs."""
        return nullcontext()

    def rollback(self, length: int) -> None:
        """Forget everything from position `length` on; nothing happens where less is held."""
        self.cache.length = min(self.cache.length, length)


class Proposer(Protocol):
    """A drafter that is no model: it names tokens outright. In place of the drafter's Runner."""

    length: int
    cache: object  # has `kv_bytes` and `peak_entries`

    def prefill(self, tokens: list[int], progress=None) -> None: ...
    def propose(self, ids: list[int], gamma: int) -> list[int]:
        """At most `gamma` tokens that may follow `ids`; none is an answer."""

    def rollback(self, length: int) -> None: ...


class WholeRounds(Protocol):
    """A target and a drafter that play a round without the host in between (`bdcli.backends.cuda`)."""

    def play(self, ids: list[int], gamma: int) -> Round:
        """One round after `ids`, not appended to them; the caches hold what it read and wait for the rollback."""

    def rehearse(self, ids: list[int], gamma: int) -> float:
        """Seconds of a `play` that does not count, the random state untouched."""

    def plain(self, tokens: list[int]) -> tuple[Tensor, float]:
        """`Speculator.one_row`."""


@dataclass(frozen=True)
class Round:
    """One round. `logits` [drafted + 1, V] are the target's, for checks; they live until the next round.

    device_s: seconds that the device worked on it, where a round is one piece of work on a device of its own.
    """

    tokens: list[int]
    drafted: int
    accepted: int
    draft_s: float
    verify_s: float
    logits: Tensor = field(repr=False)
    device_s: float | None = None

    @property
    def seconds(self) -> float:
        return self.draft_s + self.verify_s


class Speculator:
    """Generates from one prompt. Without a drafter it is the autoregressive baseline: same engine, γ = 0."""

    def __init__(self, target: Runner, drafter: Runner | Proposer | None, sampling: Sampling, seed: int, device="cpu"):
        self.target, self.drafter, self.sampling = target, drafter, sampling
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self._whole = target.whole_rounds(drafter, sampling, self.generator)
        self.ids: list[int] = []
        self.prompt_tokens = 0
        self.finish_reason: str | None = None

    @property
    def new_tokens(self) -> list[int]:
        return self.ids[self.prompt_tokens :]

    def prefill(self, prompt: list[int], progress=None, target_ready: bool = False) -> None:
        """Read all of `prompt` but its last token, which the first round scores. `progress(who, done, total)`.

        `target_ready`: the target has read it already, for a generation before this one, and was rolled back to it.
        """
        self.ids, self.prompt_tokens = list(prompt), len(prompt)
        if target_ready and self.target.length != len(prompt) - 1:
            raise RuntimeError(f"the target holds {self.target.length} tokens, not {len(prompt) - 1}")
        for who, runner in (("target", None if target_ready else self.target), ("drafter", self.drafter)):
            if runner is not None:
                runner.prefill(prompt[:-1], progress and (lambda d, t, who=who: progress(who, d, t)))

    def rounds(self, max_new_tokens: int, eos: frozenset[int], controller: Controller) -> Iterator[Round]:
        """Rounds until an EOS token, which ends the text inside its block, or `max_new_tokens`, never passed."""
        self.finish_reason = None
        while self.finish_reason is None:
            left = max_new_tokens - len(self.ids) + self.prompt_tokens
            if left <= 0:
                self.finish_reason = "length"
                return
            gamma = min(controller.choose(), left - 1) if self.drafter is not None else 0
            step = self.round(gamma)
            controller.observe(step.drafted, step.accepted, step.seconds)
            end = self.cut_at(eos, len(step.tokens))
            if end is not None:
                step = replace(step, tokens=step.tokens[:end], accepted=min(step.accepted, end))
            yield step

    def cut_at(self, eos: frozenset[int], last: int) -> int | None:
        """End the text behind the first EOS among its `last` tokens; how many of them are left, None without one."""
        first = len(self.ids) - last
        end = next((i for i, token in enumerate(self.ids[first:], 1) if token in eos), None)
        if end is not None:
            del self.ids[first + end :]
            self.finish_reason = "stop"
        return end

    def round(self, gamma: int) -> Round:
        """Draft `gamma` tokens, verify them, append what is kept to `ids`."""
        if self._whole is not None:
            step = self._whole.play(self.ids, gamma)
            self._keep(step.tokens)
            return step
        with self.target.exclusive():
            return self._round(gamma)

    def _round(self, gamma: int) -> Round:
        started = time.perf_counter()
        ids, kept = self.ids, len(self.ids)
        try:
            q = self._propose(gamma)
            drafted_at = time.perf_counter()
            draft = ids[kept:]
            logits = self.target.feed(ids[self.target.length :], len(draft) + 1)
        finally:
            del ids[kept:]
        verdict = self.commit(draft, q, logits)
        verify_s = time.perf_counter() - drafted_at
        return Round(verdict.tokens, len(draft), verdict.accepted, drafted_at - started, verify_s, logits)

    def commit(self, draft: list[int], q: Tensor | None, logits: Tensor) -> Verdict:
        """Verify `draft`, drawn from q [γ, V], by the target's logits [γ + 1, V]; append what is kept and roll back."""
        verdict = self._verdict(draft, q, logits, self.generator)
        self._keep(verdict.tokens)
        return verdict

    def _verdict(self, draft: list[int], q: Tensor | None, logits: Tensor, generator: torch.Generator) -> Verdict:
        """q None stands for all mass on each token of `draft`."""
        if self.sampling.greedy:
            return verify_greedy(draft, logits)
        check_finite(logits, "target")
        if q is None and draft:
            q = _certain(draft, self.target.vocab, logits.device)
        return verify_sampled(draft, q, self.sampling.distribution(logits), generator)

    def rehearse(self, gamma: int) -> float:
        """Seconds of a round that drafts `gamma` tokens and leaves nothing behind, of the random state neither.

        A drafter that is no model proposes nothing here: the last token stands for what it would.
        """
        ids, aside = self.ids, torch.Generator(self.generator.device)
        try:
            if self._whole is not None:
                return self._whole.rehearse(ids, gamma)
            with self.target.exclusive():
                began, draft, q = time.perf_counter(), gamma * ids[-1:], None
                if gamma and not hasattr(self.drafter, "propose"):
                    draft, q = self.drafter.draft(ids, gamma, self.sampling, aside)
                self._verdict(draft, q, self.target.feed(ids[self.target.length :] + draft, gamma + 1), aside)
                return time.perf_counter() - began
        finally:
            self._keep([])

    def _keep(self, tokens: list[int]) -> None:
        """Append what a round emitted; the caches forget the rest."""
        self.ids.extend(tokens)
        self.target.rollback(len(self.ids) - 1)
        if self.drafter is not None:
            self.drafter.rollback(len(self.ids) - 1)

    def _propose(self, gamma: int) -> Tensor | None:
        """Append `gamma` draft tokens to `ids`, or what a Proposer has; returns q [γ, V] when a model was sampled."""
        if hasattr(self.drafter, "propose"):
            draft = self.drafter.propose(self.ids, gamma) if gamma else []
            self.ids += draft
            return None
        if gamma == 0:
            return None
        draft, q = self.drafter.draft(self.ids, gamma, self.sampling, self.generator)
        self.ids += draft
        return q

    def one_row(self, tokens: list[int]) -> tuple[Tensor, float]:
        """One autoregressive step of the target: logits [1, V] and seconds, the choice of a token included."""
        if self._whole is not None:
            return self._whole.plain(tokens)
        started = time.perf_counter()
        with self.target.exclusive():
            logits = self.target.feed(tokens, 1)
            best_tokens(logits, "target")
            if not self.sampling.greedy:
                draw(self.sampling.distribution(logits)[0], torch.Generator(logits.device).manual_seed(0))
        return logits, time.perf_counter() - started


def _certain(draft: list[int], vocab: int, device: torch.device) -> Tensor:
    """q [γ, V] of tokens that were not drawn: all mass on each."""
    index = torch.tensor(draft, dtype=torch.long, device=device)
    return torch.nn.functional.one_hot(index, vocab).float()
