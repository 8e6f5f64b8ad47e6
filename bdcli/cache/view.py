"""What a query may see. Decode caches and training masks both follow these rules.

Under a budget a view is  sinks | chosen chunks | the last `window` keys, the query's own among them. The rest of the
budget, γmax + 1 entries, is kept free for a draft tail, so that a rejected tail never overwrites a key still in view.
Whatever the phase of the round or the draft length, the query at position t sees exactly:

    positions 0..sinks-1  ∪  the chosen positions  ∪  t-window+1..t          window = B - sinks - chosen - γmax - 1

`FullView` and `OfficialView` answer the same questions for a cache without a budget and for the paper's rule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bdcli.base.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SINKS = 4
CHUNK_KEYS = 8
GAMMA_MAX = 16
SMALL_BUDGET = 64  # entries; below it γmax shrinks to the draft length asked for, so that a window remains
CHOSEN_SHARE = 0.5  # of what sinks and draft tail leave over goes to chosen chunks


@dataclass(frozen=True)
class View:
    """One budgeted view. `chosen` is 0 where nothing is chosen: window selection, or a prompt that fits whole."""

    budget: int
    sinks: int
    chosen: int
    gamma_max: int
    rebased: bool

    chunk_keys = CHUNK_KEYS

    @property
    def window(self) -> int:
        return self.budget - self.sinks - self.chosen - self.gamma_max - 1

    @property
    def prefix(self) -> int:
        """Entries in front of the recent ring: sinks and chosen chunks."""
        return self.sinks + self.chosen

    @property
    def ring(self) -> int:
        """Entries of the recent ring: the window and the draft tail."""
        return self.budget - self.prefix

    @property
    def last_rank(self) -> int:
        """Rank of a query whose view is full, in text order from 0. Before that a query's rank is its position."""
        return self.prefix + self.window - 1

    @property
    def depends_on_prompt(self) -> bool:
        """What is kept depends on where the prompt ends."""
        return self.chosen > 0

    def covers(self, length: int) -> bool:
        """A text of `length` tokens is seen whole."""
        return length <= self.sinks + self.window

    def reach(self, layers_above: int) -> int:
        """Last tokens of a prompt that a layer has to read, besides its sinks: a ring of them, and a window more for
        each layer above it. Where chunks are chosen there is no such bound.
        """
        return self.ring + layers_above * (self.window - 1)

    def fitted(self, length: int) -> View:
        """The same view of a text of `length` tokens, without entries that it cannot use."""
        return replace(self, budget=min(self.budget, max(length, self.sinks + 1) + self.gamma_max + 1))

    def mean_keys(self, length: int) -> float:
        """About how many keys a query of a text of `length` tokens sees, in the mean."""
        return min(length / 2, self.prefix + self.window)

    def allowed(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Bool [T, K]: may the query at position queries[i] see the sink or recent key at position keys[j]?"""
        q, k = queries[:, None], keys[None, :]
        return (k >= 0) & (k <= q) & ((k < self.sinks) | (k > q - self.window))

    def first_recent(self, prompt: int) -> int:
        """Position of the first recent key that the first query after `prompt` tokens sees."""
        return prompt - self.window + 1

    def reading(self) -> View | FullView:
        """The view under which a prompt reads itself, before anything is chosen of it."""
        if not self.chosen:
            return self
        return replace(self, budget=self.budget - self.chosen, chosen=0) if self.rebased else FULL

    def choose(self, rope, queries: Tensor, keys: Tensor, raw_keys: Tensor) -> Tensor:
        """Positions [Hkv, chosen] that are kept of a prompt; arguments as in `bdcli.cache.chunks.prompt_chunks`."""
        from bdcli.cache.chunks import prompt_chunks

        return prompt_chunks(rope, self, queries, keys, raw_keys)


@dataclass(frozen=True)
class FullView:
    """Every query sees its whole past at absolute positions."""

    rebased = False
    depends_on_prompt = False

    def covers(self, length: int) -> bool:  # noqa: ARG002
        return True

    def mean_keys(self, length: int) -> float:
        return length / 2

    def allowed(self, queries: Tensor, keys: Tensor) -> Tensor:
        return keys[None, :] <= queries[:, None]

    def reading(self) -> FullView:
        return self


FULL = FullView()


@dataclass(frozen=True)
class OfficialView(FullView):
    """The paper's rule: the prompt's best chunks, and everything after the prompt, at absolute positions."""

    budget: int

    depends_on_prompt = True
    sinks = 0

    def covers(self, length: int) -> bool:  # noqa: ARG002
        return False

    def first_recent(self, prompt: int) -> int:
        return prompt

    def reading(self) -> FullView:
        return FULL

    def choose(self, rope, queries: Tensor, keys: Tensor, raw_keys: Tensor) -> Tensor:  # noqa: ARG002
        from bdcli.cache.chunks import official_chunks

        return official_chunks(keys, self.budget, CHUNK_KEYS)


def gamma_limit(budget: int, gamma: int | None) -> int:
    """γmax of a cache. It is a constant of the budget unless the user asks for longer drafts, or the budget is tiny."""
    if budget >= SMALL_BUDGET:
        return max(GAMMA_MAX, gamma or 0)
    return gamma if gamma is not None else max(1, min(GAMMA_MAX, (budget - SINKS - 1) // 3))


def plan_view(budget: int, select: str, positions: str, gamma: int | None, prompt: int, sinks: int = SINKS) -> View:
    """The view of a `window` or `chunk` drafter for a prompt of `prompt` tokens; `gamma` None means auto.

    Chunks are chosen only when the prompt does not fit without choosing. Raises UserError on too small a budget.
    """
    gamma_max = gamma_limit(budget, gamma)
    whole = View(budget, sinks, 0, gamma_max, positions == "rebased")
    if whole.window < 1:
        raise UserError(
            f"budget {budget} is too small: {sinks} sinks + {gamma_max} draft tokens + 2 need {sinks + gamma_max + 2}",
            "Raise --budget or lower --gamma",
        )
    if select == "window" or prompt <= sinks + whole.window:
        return whole
    chosen = int(whole.window * CHOSEN_SHARE) // CHUNK_KEYS * CHUNK_KEYS
    return View(budget, sinks, chosen, gamma_max, positions == "rebased")
