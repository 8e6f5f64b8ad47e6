"""What the target writes after many prompts: speculative decoding of several texts at a time.

A round drafts for every text, then one forward of the target verifies all drafts: its weights are read once a round,
whatever the texts' lengths. (A small compiled target samples alone, which is quicker there.) Each text has its caches
and its seed, so what is written does not depend on its company, up to rounding of low-precision kernels that torch
chooses by the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bdcli.backends.select import torch_backend
from bdcli.base.errors import NonFiniteError
from bdcli.config.decode import DecodeOptions
from bdcli.decode.pair import Pair
from bdcli.decode.session import Session
from bdcli.speculation.drafter import Draft
from bdcli.speculation.speculator import NO_DRAFT, Speculator

BUDGET, GAMMA = 512, 4  # how the undistilled drafter helps
SMALL_TARGET_BYTES = 2**27  # a smaller compiled target samples faster alone than with a drafter


class Writer:
    """Texts of `pair`, up to `together` at once where that pays: compiled steps are bound by each text's own KV.

    On a GPU torch writes: captured rounds serve one text, whose caches they are tied to.
    """

    def __init__(self, pair: Pair, together: int):
        compiled = pair.backend.name == "compiled"
        self._pair = pair if compiled else replace(pair, backend=torch_backend("many texts at a time"))
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
        pair = self._pair
        options = DecodeOptions(
            budget=BUDGET, gamma=GAMMA, max_new_tokens=tokens, temperature=temperature, baseline="off"
        )
        session, drafter = Session(pair, options), None
        quick = pair.backend.name == "compiled" and pair.target.weight_bytes < SMALL_TARGET_BYTES
        if session.sampling.greedy or not quick:
            drafter = session.drafter(len(prompt))
        target = session.target(len(prompt), GAMMA)
        text = Speculator(target, drafter, session.sampling, seed, pair.target.device)
        text.prefill(prompt)
        return text

    def _finish(self, texts: Sequence[Speculator], tokens: int) -> list[Speculator]:
        """Rounds until every text has ended; returns those that broke."""
        active, broken = list(texts), []
        while active:
            first = active[0]
            gammas = [min(GAMMA, tokens - len(text.new_tokens) - 1) for text in active]
            with first.target.exclusive():
                try:
                    drafts = self._draft(active, gammas)
                except NonFiniteError:
                    return [*broken, *active]
                unread = [text.ids[text.target.length :] + draft.tokens for text, draft in zip(active, drafts)]
                rows = [len(draft.tokens) + 1 for draft in drafts]
                logits = first.target.feed_together([text.target for text in active], unread, rows)
            unfinished = []
            for text, draft, own_logits in zip(active, drafts, logits, strict=True):
                try:
                    verdict = text.commit(draft, own_logits)
                except NonFiniteError:
                    broken.append(text)
                    continue
                ended = text.cut_at(self._pair.eos, len(verdict.tokens)) is not None
                if not ended and len(text.new_tokens) < tokens:
                    unfinished.append(text)
            active = unfinished
        return broken

    def _draft(self, texts: Sequence[Speculator], gammas: Sequence[int]) -> list[Draft]:
        """A draft for each text; empty ones where nothing drafts."""
        if texts[0].drafter is None:
            return [NO_DRAFT] * len(texts)
        drafters, ids, generators = zip(*((text.drafter, text.ids, text.generator) for text in texts))
        return texts[0].drafter.draft_together(drafters, ids, gammas, texts[0].sampling, generators)
