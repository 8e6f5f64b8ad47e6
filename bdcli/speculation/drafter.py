"""What proposes tokens: a model under its view, or anything else with the same few methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bdcli.speculation.runner import Runner
from bdcli.speculation.sampling import Sampling, SeenTokens, best_tokens, draw


class Draft(NamedTuple):
    """Proposed tokens and q [γ, V], the distributions they were drawn from; None: all mass on each token."""

    tokens: list[int]
    q: Tensor | None


class Drafter(Protocol):
    """Proposes tokens after a text. `runner` is the model behind it, None for a drafter that is no model."""

    runner: Runner | None

    @property
    def length(self) -> int:
        """Tokens read."""

    @property
    def peak_entries(self) -> int:
        """The most KV entries per layer and head ever held."""

    @property
    def kv_bytes(self) -> int: ...

    @property
    def weight_bytes(self) -> int: ...

    def bind(self, target: Runner) -> None:
        """Called before anything else with the target that will verify."""

    def prefill(self, tokens: list[int], on_block: Callable[[int, int], None] | None = None) -> None: ...

    def draft(self, ids: list[int], gamma: int, sampling: Sampling, generator: torch.Generator) -> Draft:
        """At most `gamma` >= 1 tokens that may follow `ids`; none is an answer."""

    def rehearse(self, ids: list[int], gamma: int, sampling: Sampling, generator: torch.Generator) -> Draft:
        """A draft of exactly `gamma` tokens, whatever the text, to measure what a round of that size costs."""

    def rollback(self, length: int) -> None: ...


class ModelDrafter:
    """A model that drafts one token after the other. Backends that draft in one call derive from it.

    `own`: the model is the target itself, perhaps in fewer bits. Then the keys and values that the target has computed
    are copied instead of computed again, of the prompt and of every round, where the cache can take them.
    """

    def __init__(self, runner: Runner, own: bool = False):
        self.runner, self._own = runner, own
        self._target: Runner | None = None
        self._seen: SeenTokens | None = None  # of the text, while there is a repetition penalty

    @property
    def length(self) -> int:
        return self.runner.length

    @property
    def peak_entries(self) -> int:
        return self.runner.cache.peak_entries

    @property
    def kv_bytes(self) -> int:
        return self.runner.cache.kv_bytes

    @property
    def weight_bytes(self) -> int:
        return self.runner.model.weight_bytes

    def bind(self, target: Runner) -> None:
        if self._own and self.runner.cache.copies:
            self._target = target

    def prefill(self, tokens: list[int], on_block: Callable[[int, int], None] | None = None) -> None:
        self._seen = None
        if self._target is None:
            self.runner.prefill(tokens, on_block)
        else:
            self.runner.cache.copy_from(self._target.cache, len(tokens))
            if on_block:
                on_block(1, 1)

    def rollback(self, length: int) -> None:
        """Forget everything from position `length` on, which the target has read as far."""
        self.runner.rollback(length)
        if self._target is not None:
            self.runner.cache.copy_from(self._target.cache, length)

    def penalised(self, row: Tensor, penalty: float, ids: list[int], drafted: list[int]) -> Tensor:
        """Logits [1, V] with the repetition penalty of the text `ids` and what is drafted after it."""
        self._seen = self._seen or SeenTokens(self.runner.vocab, row.device)
        return self._seen.penalised(row, penalty, ids, drafted)

    def draft(self, ids: list[int], gamma: int, sampling: Sampling, generator: torch.Generator) -> Draft:
        """Exactly `gamma` >= 1 tokens to follow `ids`, each read but the last."""
        return self.draft_together([self], [ids], [gamma], sampling, [generator])[0]

    rehearse = draft

    @classmethod
    def draft_together(
        cls,
        drafters: Sequence[ModelDrafter],
        ids: Sequence[list[int]],
        gammas: Sequence[int],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
    ) -> list[Draft]:
        """`draft` of drafters of one model, each with a text of its own; γ may be 0 for some."""
        runners = [drafter.runner for drafter in drafters]
        drafted: list[list[int]] = [[] for _ in runners]
        rows: list[list[Tensor]] = [[] for _ in runners]
        unread = [text[runner.length :] for runner, text in zip(runners, ids, strict=True)]
        for place in range(max(gammas)):
            active = [i for i, gamma in enumerate(gammas) if place < gamma]
            feed = type(runners[0]).feed_together
            logits = feed([runners[i] for i in active], [unread[i] for i in active], [1] * len(active))
            for i, row in zip(active, logits):
                best = best_tokens(row, "drafter")
                if sampling.repetition_penalty != 1:
                    row = drafters[i].penalised(row, sampling.repetition_penalty, ids[i], drafted[i])
                    best = row.argmax(-1).tolist()
                if sampling.greedy:
                    drafted[i] += best
                else:
                    rows[i].append(sampling.distribution(row))
                    drafted[i].append(draw(rows[i][-1][0], generators[i]))
                unread[i] = drafted[i][-1:]
        return [Draft(tokens, torch.cat(q) if q else None) for tokens, q in zip(drafted, rows)]
