"""A model bound to a static cache, and whole rounds of a target and a drafter as CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from bdcli.backends.cuda.graph import capture, new_pool
from bdcli.backends.cuda.program import Feed, RoundProgram, SamplingTensors, Text
from bdcli.model.llama import Model
from bdcli.speculation.rounds import Round
from bdcli.speculation.runner import Runner
from bdcli.speculation.sampling import Sampling, non_finite

FEED_ROWS = 32  # tokens of a piece when a cache catches up; pieces are powers of two, so that few graphs are made


class StaticRunner(Runner):
    """`cache` is one of `bdcli.backends.cuda.caches`. Logits that `feed` returns live until its next call."""

    def __init__(self, model: Model, cache, vocab: int | None = None):
        super().__init__(model, cache, vocab)
        self._feeds: dict[tuple[int, int], tuple[Feed, Callable[[], None]]] = {}
        self._pool = new_pool(model.device)

    def feed(self, tokens: list[int], rows: int) -> Tensor:
        """As `Runner.feed`; one graph for each number of tokens and rows."""
        limit = self.cache.max_rows
        if rows > limit:
            raise RuntimeError(f"{rows} rows at once, but this cache takes {limit}")
        head = max(0, len(tokens) - limit)
        self.catch_up(tokens[:head])
        return self._feed(tokens[head:], rows)

    def catch_up(self, tokens: list[int]) -> None:
        """Append `tokens`; no logits."""
        size = min(FEED_ROWS, self.cache.max_rows)
        while tokens:
            while size > len(tokens):
                size //= 2
            self._feed(tokens[:size], 0)
            tokens = tokens[size:]

    def _feed(self, tokens: list[int], rows: int) -> Tensor:
        self.claim(self.length, len(tokens))
        given = torch.tensor([self.length, *tokens])
        key = len(tokens), rows
        if key not in self._feeds:
            feed = Feed(self, *key)
            feed.given.copy_(given)
            self._feeds[key] = feed, capture(feed, self.model.device, self._pool)
        feed, run = self._feeds[key]
        feed.given.copy_(given)
        run()
        self.cache.length += len(tokens)
        return feed.logits

    def claim(self, start: int, rows: int) -> None:
        """Rows that a program is about to append from position `start` on: refused beyond the capacity."""
        self.cache.reserve(start, rows)
        self.cache.record(start + rows)

    def whole_rounds(
        self, drafter: StaticRunner | None, sampling: Sampling, generator: torch.Generator
    ) -> GraphRounds | None:
        """As `Runner.whole_rounds`; none with a repetition penalty, which the program does not know."""
        if sampling.repetition_penalty != 1:
            return None
        return GraphRounds(self, drafter, sampling, generator)


class GraphRounds:
    """Rounds of one generation, one graph for each γ that is asked for.

    Graphs are made when they are first needed, outside the time of a step, as `warm_up` keeps first uses out of it.
    """

    def __init__(
        self, target: StaticRunner, drafter: StaticRunner | None, sampling: Sampling, generator: torch.Generator
    ):
        self.target, self.drafter = target, drafter
        device = target.model.device
        self._generator, self._aside = generator, torch.Generator(device=device)  # measuring must not change the text
        self.text = Text(
            torch.zeros(1, target.cache.capacity, dtype=torch.long, device=device),
            *(torch.zeros(1, dtype=torch.long, device=device) for _ in range(2)),
        )
        self._sampling = None if sampling.greedy else SamplingTensors.of(sampling, target.vocab, device)
        self._device_text: tuple[int, int, list[int]] | None = None  # length, held and last tokens that the device has
        self._rounds: dict[int, tuple[RoundProgram, Callable[[], None]]] = {}
        self._pool = new_pool(device)

    def play(self, ids: list[int], gamma: int) -> Round:
        """One round after `ids`, which are not changed; caches end where the round wrote, for a rollback to follow."""
        return self._play(ids, gamma, self._generator)

    def rehearse(self, ids: list[int], gamma: int) -> float:
        """`play`, with other random numbers, of which only the seconds count."""
        return self._play(ids, gamma, self._aside).seconds

    def _play(self, ids: list[int], gamma: int, generator: torch.Generator) -> Round:
        kept = len(ids)
        self.target.catch_up(ids[self.target.length : kept - 1])
        if gamma:
            self._ready(ids, gamma)
        step = self._run(kept, ids[-2:], gamma, generator)
        self.target.cache.length = kept + gamma
        if gamma:
            self.drafter.cache.length = kept + gamma - 1
        return step

    def plain(self, tokens: list[int]) -> tuple[Tensor, float]:
        """A round of γ = 0 after the one token that follows what the target holds: logits [1, V] and seconds."""
        kept = self.target.length + 1
        step = self._run(kept, tokens[-1:], 0, self._aside)
        self.target.cache.length = kept
        return step.logits, step.seconds

    def _ready(self, ids: list[int], gamma: int) -> None:
        """The drafter lacks at most two tokens, and its cache can hold what it will read."""
        drafter, kept = self.drafter, len(ids)
        if gamma > drafter.cache.max_rows - 2:
            raise RuntimeError(f"a draft of {gamma} tokens, but this cache takes {drafter.cache.max_rows - 2}")
        drafter.catch_up(ids[drafter.length : kept - 2])
        drafter.claim(drafter.length, kept - drafter.length + gamma - 1)

    def _run(self, kept: int, tail: list[int], gamma: int, generator: torch.Generator) -> Round:
        self.target.claim(kept - 1, gamma + 1)
        if gamma not in self._rounds:
            self._update_text(kept, tail, gamma)
            program = RoundProgram(self.target, self.drafter, self.text, self._sampling, gamma)
            self._rounds[gamma] = program, capture(program, self.target.model.device, self._pool)
            self._device_text = None  # the capture has run it once
        program, run = self._rounds[gamma]
        self._update_text(kept, tail, gamma)
        began = time.perf_counter()
        if self._sampling is not None:
            program.uniform.uniform_(generator=generator)
        run()
        *tokens, accepted, sound = program.result.tolist()  # waits for the round: the one copy to the host
        draft_s = program.clock.seconds(0, 1) if gamma else 0.0
        seconds = time.perf_counter() - began
        if accepted < 0 or sound < 0:
            self._device_text = None
            raise non_finite("drafter" if sound < 0 else "target")
        tokens = tokens[: accepted + 1]
        now = kept + len(tokens)
        self._device_text = now, min(kept - 1 + gamma, now - 1) if gamma else self._held, [*tail, *tokens][-2:]
        return Round(tokens, gamma, accepted, draft_s, seconds - draft_s, program.logits, program.clock.seconds(0, 2))

    @property
    def _held(self) -> int:
        return self.drafter.length if self.drafter is not None else 0

    def _update_text(self, kept: int, tail: list[int], gamma: int) -> None:
        """Bring the device's text to length `kept`, ending in `tail`; nothing to do after an undisturbed round."""
        length, held, known = self._device_text or (-1, -1, [])
        if length == kept and known[-len(tail) :] == tail and (held == self._held or not gamma):
            return
        self.text.ids[0, kept - len(tail) : kept].copy_(torch.tensor(tail))
        self.text.length.fill_(kept)
        self.text.held.fill_(self._held)
        self._device_text = kept, self._held, tail
