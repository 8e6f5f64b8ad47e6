"""The autoregressive baseline, measured inside the speculative run: same target, cache, context and minute.

After a round the target is rolled back and walks over the tokens just emitted one row at a time, as plain decoding
would. That gives the seconds of AR at exactly these positions, and whether AR would have written the same tokens.
The cache rows the round had written are put back afterwards, so that measuring never changes the text.
"""

from __future__ import annotations

import math
import time

import torch

from bdcli.controller import AutoGamma, Controller, FixedGamma
from bdcli.speculate import Reader, Speculator, Step

SAMPLES = 10  # rounds replayed in a run by mode `sample`
TIE_FACTOR = 4.0  # a differing argmax within this many low-precision logit errors is a tie
CALIBRATION_ROWS = (1, 2, 5, 9, 17)


class Baseline:
    """`mode` off | sample | full; `check` replays every round whatever the mode. Greedy runs are compared as well."""

    def __init__(self, mode: str, check: bool, max_new_tokens: int):
        self._every = check or mode == "full"
        self._on = self._every or mode == "sample"
        self._gap = 0 if self._every else max(1, max_new_tokens // SAMPLES)
        self._due = 0
        self._gaps: list[float] = []  # one-row logit of the AR choice minus that of the emitted token
        self._squares, self._logits = 0.0, 0
        self._exact = True  # fp32: no tie rule
        self._compared = False
        self.steps, self.seconds = 0, 0.0

    def after(self, speculator: Speculator, step: Step) -> None:
        """Replay `step` if it is due. Call between rounds."""
        written = len(speculator.ids) - speculator.prompt_tokens
        if not self._on or written < self._due:
            return
        self._due = written + self._gap
        greedy = speculator.sampling.greedy
        self._compared = greedy
        self._exact = speculator.target.model.dtype is torch.float32
        ids, cache = speculator.ids, speculator.target.cache
        first = len(ids) - len(step.tokens)
        saved = cache.save(first - 1)
        cache.length = first - 1
        for i, token in enumerate(step.tokens):
            logits, seconds = speculator.one_row(ids[first - 1 + i : first + i])
            self.steps, self.seconds = self.steps + 1, self.seconds + seconds
            if greedy:
                self._squares += float((logits[0] - step.logits[i]).square().sum())
                self._logits += logits.shape[-1]
                gap = float(logits.max() - logits[0, token])
                # an exact tie is broken by index, so equal logits can still be a different argmax
                if gap > 0 or int(logits.argmax()) != token:
                    self._gaps.append(gap)
        cache.restore(saved)

    @property
    def tokens_per_second(self) -> float | None:
        return self.steps / self.seconds if self.steps else None

    @property
    def logit_error(self) -> float:
        """RMS difference between one-row and many-row logits of the same positions."""
        return math.sqrt(self._squares / self._logits) if self._logits else 0.0

    @property
    def ties(self) -> int | None:
        """Positions where AR would have chosen another token within the error of the dtype; None if not compared."""
        if not self._compared:
            return None
        return 0 if self._exact else sum(gap <= TIE_FACTOR * self.logit_error for gap in self._gaps)

    @property
    def output_equal(self) -> bool | None:
        """True when every emitted token was compared and equal (ties aside); False on a difference; else None."""
        if not self._compared:
            return None
        if len(self._gaps) > self.ties:
            return False
        return True if self._every else None


def warm_up(speculator: Speculator, gamma: int | None, gamma_max: int) -> Controller:
    """Run each shape once so that no timed step pays for first use, and build the controller.

    `gamma` None means auto: then the costs of a draft token and of target forwards over 1..γmax+1 rows are measured.
    Nothing of it stays: ids, caches and the random state are as before.
    """
    target, drafter = speculator.target, speculator.drafter
    last = speculator.ids[-1:]
    auto = gamma is None and drafter is not None
    rows = [r for r in CALIBRATION_ROWS if r <= gamma_max + 1] if auto else [1, (gamma or 0) + 1]
    verify = {r: _warm_seconds(target, last * r) for r in dict.fromkeys(rows)}
    draft = _warm_seconds(drafter, last) if drafter is not None else 0.0
    return AutoGamma(gamma_max, verify, draft) if auto else FixedGamma(gamma or 0)


def _warm_seconds(reader: Reader, tokens: list[int]) -> float:
    """Seconds of one forward over `tokens` at the end of the cache, the second of two, undone."""
    start, seconds = reader.length, 0.0
    for _ in range(2):
        began = time.perf_counter()
        reader.feed(tokens, len(tokens)).max(-1).indices.tolist()
        seconds = time.perf_counter() - began
        reader.rollback(start)
    return seconds
