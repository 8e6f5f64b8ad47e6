"""The autoregressive baseline, measured inside the speculative run: same target, cache, context and minute.

After a round the target is rolled back and walks over the tokens just emitted one row at a time, as plain decoding
would. That gives the seconds of AR at exactly these positions, and whether AR would have written the same tokens.
The cache rows the round had written are put back afterwards, so that measuring never changes the text.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bdcli.speculation.draft_length import AutoGamma, Controller, FixedGamma
from bdcli.speculation.rounds import Round
from bdcli.speculation.runner import Runner
from bdcli.speculation.sampling import SeenTokens
from bdcli.speculation.speculator import Speculator

SAMPLES = 10  # rounds replayed in a run by mode `sample`
TIE_FACTOR = 4.0  # a differing argmax within this many low-precision logit errors is a tie
CALIBRATION_GAMMAS = (0, 1, 3, 5, 7, 8, 9, 12)  # and the longest; nine rows are the most that one pass takes (CPU)
CALIBRATIONS = 3  # rounds of each after the first, which is not timed; the best counts
LONG_ROUND_S = 0.1  # so long a one is not repeated: noise is small against it, and a large model would wait
CHECK_ROWS = 8  # rows of the many-row forwards that `teacher_force` measures the logit error with


class TieRule:
    """Would one-row greedy decoding have chosen these tokens? Exactly where the engine is exact, else within its error.

    In low precision torch's one-row and many-row kernels round differently. The RMS difference of their logits on the
    same positions is the error; a token whose one-row logit lies within TIE_FACTOR errors of the best, or one unit in
    its last place (logits are themselves rounded to the dtype), is a tie, beyond it a difference.
    """

    def __init__(self, target: Runner):
        self._exact = target.exact
        self._unit = torch.finfo(target.model.dtype).eps
        # best one-row logit minus that of the emitted token, and one unit of the best, where they differ
        self._gaps: list[tuple[float, float]] = []
        self._squares, self._logits = 0.0, 0

    def compare(self, one_row: Tensor, many_rows: Tensor, token: int) -> None:
        """One emitted `token` and the logits [V] of its position, from a forward over one row and over several."""
        self._squares += float((one_row - many_rows).square().sum())
        self._logits += one_row.shape[-1]
        best = float(one_row.max())
        gap = best - float(one_row[token])
        # an exact tie is broken by index, so equal logits can still be a different argmax
        if gap > 0 or int(one_row.argmax()) != token:
            self._gaps.append((gap, self._unit * abs(best)))

    @property
    def logit_error(self) -> float:
        return math.sqrt(self._squares / self._logits) if self._logits else 0.0

    @property
    def ties(self) -> int:
        return 0 if self._exact else sum(gap <= max(TIE_FACTOR * self.logit_error, unit) for gap, unit in self._gaps)

    @property
    def equal(self) -> bool:
        """No token differs beyond a tie."""
        return len(self._gaps) == self.ties


def teacher_force(target: Runner, prompt: list[int], text: list[int], penalty: float = 1.0) -> TieRule:
    """Judge a greedy `text` after `prompt` by one-row decoding of `target`, which holds the prompt but its last token.

    `penalty` is the repetition penalty under which it was generated. Two passes over the text, one row and several rows
    at a time; afterwards the target holds what it did.
    """
    rule, held = TieRule(target), len(prompt) - 1
    seen = SeenTokens(target.vocab, target.model.device)
    fed = [prompt[-1], *text[:-1]]
    target.rollback(held)
    alone = [target.feed([token], 1)[0].clone() for token in fed]
    target.rollback(held)
    for start in range(0, len(fed), CHECK_ROWS):
        block = fed[start : start + CHECK_ROWS]
        for i, row in enumerate(target.feed(block, len(block)), start):
            if penalty == 1:
                rule.compare(alone[i], row, text[i])
                continue
            pair = torch.stack((alone[i], row))
            rule.compare(*seen.penalised(pair, penalty, [*prompt, *text[:i]]), text[i])
    target.rollback(held)
    return rule


class Baseline:
    """`mode` off | sample | full; `check` replays every round whatever the mode. Greedy runs are compared as well."""

    def __init__(self, mode: str, check: bool, max_new_tokens: int):
        self._every = check or mode == "full"
        self._on = self._every or mode == "sample"
        self._gap = 0 if self._every else max(1, max_new_tokens // SAMPLES)
        self._due = 0
        self._rule: TieRule | None = None  # None while nothing was compared
        self.steps, self.seconds = 0, 0.0

    def after(self, speculator: Speculator, done: Round) -> None:
        """Replay the round `done` if it is due. Call between rounds."""
        written = len(speculator.ids) - speculator.prompt_tokens
        if not self._on or written < self._due:
            return
        self._due = written + self._gap
        if speculator.sampling.greedy and self._rule is None:
            self._rule = TieRule(speculator.target)
        ids, cache = speculator.ids, speculator.target.cache
        first = len(ids) - len(done.tokens)
        saved = cache.save(first - 1)
        cache.length = first - 1
        speculator.one_row(ids[first - 1 : first])  # not timed: plain decoding would not come from doing other things
        cache.length = first - 1
        for i, token in enumerate(done.tokens):
            logits, seconds = speculator.one_row(ids[first - 1 + i : first + i])
            self.steps, self.seconds = self.steps + 1, self.seconds + seconds
            if self._rule is not None:
                self._rule.compare(logits[0], done.logits[i], token)
        cache.restore(saved)

    @property
    def tokens_per_second(self) -> float | None:
        return self.steps / self.seconds if self.steps else None

    @property
    def logit_error(self) -> float:
        """RMS difference between one-row and many-row logits of the same positions."""
        return self._rule.logit_error if self._rule else 0.0

    @property
    def ties(self) -> int | None:
        """Positions where AR would have chosen another token within the error of the dtype; None if not compared."""
        return self._rule.ties if self._rule else None

    @property
    def output_equal(self) -> bool | None:
        """True when every emitted token was compared and equal (ties aside); False on a difference; else None."""
        if self._rule is None:
            return None
        if not self._rule.equal:
            return False
        return True if self._every else None


def warm_up(speculator: Speculator, gamma: int | None, gamma_max: int) -> Controller:
    """Run each shape once so that no timed step pays for first use, and build the controller.

    `gamma` None means auto: then rounds of several γ up to γmax are measured. Nothing of it stays: ids, caches and the
    random state are as before.
    """
    auto = gamma is None and speculator.drafter is not None
    drafts = [*(g for g in CALIBRATION_GAMMAS if g < gamma_max), gamma_max] if auto else [0, gamma or 0]
    costs = dict.fromkeys(drafts, math.inf)
    for g in costs:
        speculator.rehearse(g)
    for _ in range(CALIBRATIONS):  # all γ in turn, so that a slow moment is no γ's own
        for g, best in costs.items():
            if not LONG_ROUND_S < best < math.inf:
                costs[g] = min(best, speculator.rehearse(g))
    return AutoGamma(gamma_max, costs) if auto else FixedGamma(gamma or 0)
