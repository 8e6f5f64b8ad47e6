"""A model bound to its KV cache: what every backend implements and speculation drives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from bdcli.cache.base import BaseCache
from bdcli.model.llama import Model
from bdcli.speculation.rounds import WholeRounds
from bdcli.speculation.sampling import Sampling


class Runner:
    """A model bound to a KV cache, in plain torch.

    Logits are padded with -inf or cut to `vocab`, the target's vocabulary size, so that both models' rows line up; ids
    that the model does not have are read as id 0.
    """

    def __init__(self, model: Model, cache: BaseCache, vocab: int | None = None):
        self.model, self.cache = model, cache
        self.vocab = vocab or model.config.vocab_size

    @property
    def length(self) -> int:
        """Tokens read."""
        return self.cache.length

    @property
    def exact(self) -> bool:
        """A row's logits do not depend on how many rows are read at once, up to rounding that decides nothing."""
        return self.model.dtype is torch.float32

    def prefill(self, tokens: list[int], on_block: Callable[[int, int], None] | None = None) -> None:
        """Read a prompt into the empty cache. `on_block(done, total)` counts tokens."""
        self.model.prefill(self.known(tokens), self.cache, on_block)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)  # a timed prefill includes its work

    def feed(self, tokens: list[int], rows: int) -> Tensor:
        """Append `tokens`; fp32 logits [rows, V] of the last `rows`."""
        return self.aligned(self.model.forward(self.known(tokens), self.cache, rows))

    @classmethod
    def feed_together(
        cls, runners: Sequence[Runner], tokens: Sequence[list[int]], rows: Sequence[int]
    ) -> Sequence[Tensor]:
        """`feed` of runners of one model, each with a text of its own."""
        if len(runners) == 1:
            return [runners[0].feed(tokens[0], rows[0])]
        known = [runner.known(text) for runner, text in zip(runners, tokens)]
        logits = runners[0].model.forward_together(known, [runner.cache for runner in runners], rows)
        return [runner.aligned(part) for runner, part in zip(runners, logits)]

    def aligned(self, logits: Tensor) -> Tensor:
        """Logits [T, V] of the model's own vocabulary, cut or padded to the target's."""
        missing = self.vocab - logits.shape[-1]
        if missing > 0:
            return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        return logits[:, : self.vocab] if missing else logits

    def known(self, tokens: list[int]) -> list[int]:
        """`tokens` with id 0 in place of those that the model does not have."""
        own = self.model.config.vocab_size
        return tokens if own >= self.vocab else [token if token < own else 0 for token in tokens]

    def rollback(self, length: int) -> None:
        """Forget everything from position `length` on; nothing happens where less is held."""
        self.cache.length = min(self.cache.length, length)

    def whole_rounds(
        self, drafter: Runner | None, sampling: Sampling, generator: torch.Generator
    ) -> WholeRounds | None:
        """Rounds of this target with the model `drafter` as one program each; None where a round is made of steps."""

    def exclusive(self) -> AbstractContextManager:
        """Entered while rounds run: keeps the threads of others off the processors that this runner needs."""
        return nullcontext()
