"""The speculation engine: draft, verify, accept. It knows token ids only; it yields rounds, callers show and store.

A round: the drafter proposes γ tokens after everything emitted so far; the target scores the last emitted token and
the proposals in one forward; verification keeps a prefix of them and adds one token of the target's own; both caches
roll back by moving an integer. Each model is fed `ids[length:]`, so a full acceptance needs no catch-up forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bdcli.base.progress import SILENT, Progress
from bdcli.speculation.draft_length import Controller
from bdcli.speculation.drafter import Draft, Drafter
from bdcli.speculation.rounds import Round
from bdcli.speculation.runner import Runner
from bdcli.speculation.sampling import (
    Sampling,
    SeenTokens,
    Verdict,
    best_tokens,
    check_finite,
    draw,
    verify_greedy,
    verify_sampled,
)

NO_DRAFT = Draft([], None)


class Speculator:
    """Generates from one prompt. Without a drafter it is the autoregressive baseline: same engine, γ = 0."""

    def __init__(self, target: Runner, drafter: Drafter | None, sampling: Sampling, seed: int, device="cpu"):
        self.target, self.drafter, self.sampling = target, drafter, sampling
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self._whole = None
        self._seen: SeenTokens | None = None  # of the text, while there is a repetition penalty
        if drafter is not None:
            drafter.bind(target)
        if drafter is None or drafter.runner is not None:
            self._whole = target.whole_rounds(drafter and drafter.runner, sampling, self.generator)
        self.ids: list[int] = []
        self.prompt_tokens = 0
        self.finish_reason: str | None = None

    @property
    def new_tokens(self) -> list[int]:
        return self.ids[self.prompt_tokens :]

    def prefill(self, prompt: list[int], progress: Progress = SILENT, target_ready: bool = False) -> None:
        """Read all of `prompt` but its last token, which the first round scores.

        `target_ready`: the target has read it already, for a generation before this one, and was rolled back to it.
        """
        self.ids, self.prompt_tokens, self._seen = list(prompt), len(prompt), None
        if target_ready and self.target.length != len(prompt) - 1:
            raise RuntimeError(f"the target holds {self.target.length} tokens, not {len(prompt) - 1}")
        for role, model in (("target", None if target_ready else self.target), ("drafter", self.drafter)):
            if model is not None:
                model.prefill(prompt[:-1], _reading(progress, f"reading the prompt: {role}"))

    def rounds(self, max_new_tokens: int, eos: frozenset[int], controller: Controller) -> Iterator[Round]:
        """Rounds until an EOS token, which ends the text inside its block, or `max_new_tokens`, never passed."""
        self.finish_reason = None
        while self.finish_reason is None:
            left = max_new_tokens - len(self.ids) + self.prompt_tokens
            if left <= 0:
                self.finish_reason = "length"
                return
            gamma = min(controller.choose(), left - 1) if self.drafter is not None else 0
            done = self.round(gamma)
            controller.observe(done.drafted, done.accepted, done.seconds)
            end = self.cut_at(eos, len(done.tokens))
            if end is not None:
                done = replace(done, tokens=done.tokens[:end], accepted=min(done.accepted, end))
            yield done

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
            done = self._whole.play(self.ids, gamma)
            self._keep(done.tokens)
            return done
        with self.target.exclusive():
            started = time.perf_counter()
            draft = self.drafter.draft(self.ids, gamma, self.sampling, self.generator) if gamma else NO_DRAFT
            drafted_at = time.perf_counter()
            logits = self.target.feed(self.ids[self.target.length :] + draft.tokens, len(draft.tokens) + 1)
            logits = self.penalised(logits, draft.tokens)
            verdict = self.commit(draft, logits)
            verify_s = time.perf_counter() - drafted_at
        return Round(verdict.tokens, len(draft.tokens), verdict.accepted, drafted_at - started, verify_s, logits)

    def penalised(self, logits: Tensor, draft: list[int]) -> Tensor:
        """The target's logits [γ + 1, V] after the text and `draft`, with the repetition penalty of each row's text."""
        penalty = self.sampling.repetition_penalty
        if penalty == 1:
            return logits
        check_finite(logits, "target")  # a penalty could hide an infinite logit
        self._seen = self._seen or SeenTokens(self.target.vocab, logits.device)
        return self._seen.penalised(logits, penalty, self.ids, draft)

    def commit(self, draft: Draft, logits: Tensor) -> Verdict:
        """Verify `draft` by the target's logits [γ + 1, V]; append what is kept and roll back."""
        verdict = self._verdict(draft, logits, self.generator)
        self._keep(verdict.tokens)
        return verdict

    def _verdict(self, draft: Draft, logits: Tensor, generator: torch.Generator) -> Verdict:
        if self.sampling.greedy:
            return verify_greedy(draft.tokens, logits)
        check_finite(logits, "target")
        q = draft.q
        if q is None and draft.tokens:
            q = _one_hot(draft.tokens, self.target.vocab, logits.device)
        return verify_sampled(draft.tokens, q, self.sampling.distribution(logits), generator)

    def rehearse(self, gamma: int) -> float:
        """Seconds of a round that drafts `gamma` tokens and leaves nothing behind, not even in the random state."""
        ids, aside = self.ids, torch.Generator(self.generator.device)
        try:
            if self._whole is not None:
                return self._whole.rehearse(ids, gamma)
            with self.target.exclusive():
                started = time.perf_counter()
                draft = self.drafter.rehearse(ids, gamma, self.sampling, aside) if gamma else NO_DRAFT
                logits = self.target.feed(ids[self.target.length :] + draft.tokens, gamma + 1)
                self._verdict(draft, self.penalised(logits, draft.tokens), aside)
                return time.perf_counter() - started
        finally:
            self._keep([])

    def _keep(self, tokens: list[int]) -> None:
        """Append what a round emitted; the caches forget the rest."""
        self.ids.extend(tokens)
        self.target.rollback(len(self.ids) - 1)
        if self.drafter is not None:
            self.drafter.rollback(len(self.ids) - 1)

    def one_row(self, tokens: list[int]) -> tuple[Tensor, float]:
        """One autoregressive step of the target: logits [1, V] and seconds, the choice of a token included."""
        if self._whole is not None:
            return self._whole.plain(tokens)
        penalty, text = self.sampling.repetition_penalty, self.ids[: self.target.length + 1]
        seen = SeenTokens(self.target.vocab, self.generator.device)
        if penalty != 1:
            seen.read(text[:-1])  # plain decoding would have done so before
        started = time.perf_counter()
        with self.target.exclusive():
            logits = self.target.feed(tokens, 1)
            if penalty != 1:
                logits = seen.penalised(logits, penalty, text)
            best_tokens(logits, "target")
            if not self.sampling.greedy:
                draw(self.sampling.distribution(logits)[0], torch.Generator(logits.device).manual_seed(0))
        return logits, time.perf_counter() - started


def _reading(progress: Progress, phase: str) -> Callable[[int, int], None]:
    """Shows tokens read of all, and how many a second."""
    began = time.perf_counter()

    def report(done: int, total: int) -> None:
        progress.advance(phase, done, total, f"{done / (time.perf_counter() - began):.0f} tokens/s")

    return report


def _one_hot(tokens: list[int], vocab: int, device: torch.device) -> Tensor:
    """q [γ, V] of tokens that were not drawn: all mass on each."""
    index = torch.tensor(tokens, dtype=torch.long, device=device)
    return torch.nn.functional.one_hot(index, vocab).float()
