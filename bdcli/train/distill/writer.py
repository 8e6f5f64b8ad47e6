"""What the target writes after many prompts: speculative decoding of several texts at a time.

A round drafts for every text, then one forward of the target verifies all drafts: its weights are read once a round,
whatever the texts' lengths. (A small compiled target samples alone, which is quicker there.) Each text has its caches
and its seed, so what is written does not depend on its company, up to rounding of low-precision kernels that torch
chooses by the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from bdcli.backends.select import torch_backend
from bdcli.base.errors import NonFiniteError
from bdcli.config.decode import DecodeOptions
from bdcli.decode.session import Pair, drafter_runner, target_runner
from bdcli.speculation.sampling import Sampling
from bdcli.speculation.speculator import Speculator

BUDGET, GAMMA = 512, 4  # how the undistilled drafter helps
SMALL = 2**27  # bytes of a target whose compiled step costs less than drafting and judging sampled tokens in Python


class Writer:
    """Texts of `pair`, up to `together` at once where that pays: compiled steps are bound by each text's own KV.

    On a GPU torch writes: captured rounds serve one text, whose caches they are tied to.
    """

    def __init__(self, pair: Pair, together: int):
        compiled = pair.backend.name == "compiled"
        self._pair = pair if compiled else replace(pair, engine=torch_backend("many texts at a time"))
        self.together = 1 if compiled else together

    def write(
        self, prompts: Sequence[list[int]], tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[list[int] | None]:
        """Up to `tokens` ids after each prompt; None where logits were not finite."""
        found: list[list[int] | None] = []
        for at in range(0, len(prompts), self.together):
            group = slice(at, at + self.together)
            texts = [self._begin(*work, tokens, temperature) for work in zip(prompts[group], seeds[group])]
            broken = self._finish(texts, tokens)
            found += [None if text in broken else text.new_tokens for text in texts]
        return found

    def _begin(self, prompt: list[int], seed: int, tokens: int, temperature: float) -> Speculator:
        pair, sampling = self._pair, Sampling(temperature)
        options = DecodeOptions(budget=BUDGET, gamma=GAMMA, max_new_tokens=tokens)
        target, drafter = target_runner(pair, options, len(prompt), GAMMA), None
        quick = pair.backend.name == "compiled" and pair.target.weight_bytes < SMALL
        if sampling.greedy or not quick:
            drafter = drafter_runner(pair, options, len(prompt))
        text = Speculator(target, drafter, sampling, seed, pair.target.device)
        text.prefill(prompt)
        return text

    def _finish(self, texts: Sequence[Speculator], tokens: int) -> list[Speculator]:
        """Rounds until every text has ended; returns those that broke."""
        going, broken = list(texts), []
        while going:
            first = going[0]
            gammas = [min(GAMMA, tokens - len(text.new_tokens) - 1) for text in going]
            with first.target.exclusive():
                try:
                    drafts = self._draft(going, gammas)
                except NonFiniteError:
                    return [*broken, *going]
                unread = [text.ids[text.target.length :] + draft for text, (draft, _) in zip(going, drafts)]
                wanted = [len(draft) + 1 for draft, _ in drafts]
                logits = first.target.feed_together([text.target for text in going], unread, wanted)
            left = []
            for text, (draft, q), rows in zip(going, drafts, logits, strict=True):
                try:
                    verdict = text.commit(draft, q, rows)
                except NonFiniteError:
                    broken.append(text)
                    continue
                ended = text.cut_at(self._pair.eos, len(verdict.tokens)) is not None
                if not ended and len(text.new_tokens) < tokens:
                    left.append(text)
            going = left
        return broken

    def _draft(self, texts: Sequence[Speculator], gammas: Sequence[int]) -> list[tuple[list[int], Tensor | None]]:
        """A draft for each text and what it was drawn from; empty ones where nothing drafts."""
        if texts[0].drafter is None:
            return [([], None)] * len(texts)
        runners, ids, generators = zip(*((text.drafter, text.ids, text.generator) for text in texts))
        return texts[0].drafter.draft_together(runners, ids, gammas, texts[0].sampling, generators)
