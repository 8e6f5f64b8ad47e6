"""A drafter whose whole draft is one call into machine code."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bdcli.backends.cpu import tables
from bdcli.backends.cpu.runner import CompiledRunner, set_float
from bdcli.speculation.drafter import Draft, ModelDrafter
from bdcli.speculation.sampling import Sampling, non_finite


class CompiledDrafter(ModelDrafter):
    """Tokens are read, chosen and read again without Python in between."""

    runner: CompiledRunner

    def draft(self, ids: list[int], gamma: int, sampling: Sampling, generator: torch.Generator) -> Draft:
        if sampling.repetition_penalty != 1:  # which machine code does not know: one call a token
            return super().draft_together([self], [ids], [gamma], sampling, [generator])[0]
        runner = self.runner
        tokens, block = runner.known(ids[runner.length :]), min(tables.MAX_CALL_ROWS, runner.cache.max_rows)
        while len(tokens) > block:
            runner.step(tokens[:block], 0, torch.empty(0))
            tokens = tokens[block:]
        own = runner.model.config.vocab_size
        logits = torch.empty(own)
        q = None if sampling.greedy else torch.zeros(gamma, runner.vocab)
        call = runner.begin(tokens, gamma)
        call[tables.LOGITS], call[tables.KNOWN] = logits.data_ptr(), min(own, runner.vocab)
        call[tables.Q_ROWS] = 0 if q is None else q.data_ptr()
        if q is not None:
            call[tables.SEED] = torch.randint(2**63 - 1, (), generator=generator)
            call[tables.Q_STRIDE], call[tables.TOP_K] = 4 * runner.vocab, min(sampling.top_k, runner.vocab)
            set_float(call, tables.TEMPERATURE, sampling.divisor)
            set_float(call, tables.TOP_P, sampling.mass)
            set_float(call, tables.MIN_P, sampling.min_p)
        runner.run(len(tokens) + gamma - 1)
        drafted = runner.tokens[len(tokens) : len(tokens) + gamma].tolist()
        if min(drafted) < 0:
            raise non_finite("drafter")
        return Draft(drafted, q)

    rehearse = draft

    @classmethod
    def draft_together(
        cls,
        drafters: Sequence[CompiledDrafter],
        ids: Sequence[list[int]],
        gammas: Sequence[int],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
    ) -> list[Draft]:
        """As `ModelDrafter.draft_together`, one text after another."""
        work = zip(drafters, ids, gammas, generators, strict=True)
        return [d.draft(text, gamma, sampling, g) if gamma else Draft([], None) for d, text, gamma, g in work]
