"""What a drafter keeps of a text: one of four selections, parsed once from flags, recipes and stored rows.

A selection knows its names in the store, the view that it gives after a prompt, and the cache that holds it. No torch
here: caches are named by the backend (`CacheKinds`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from bdcli.cache.view import CHUNK_KEYS, FULL, FullView, OfficialView, View, gamma_limit, plan_view

if TYPE_CHECKING:
    from bdcli.cache.base import BaseCache
    from bdcli.model.llama import Model

SELECTIONS = ("window", "chunk", "official")


class CacheKinds(NamedTuple):
    """The classes of a backend's caches."""

    full: type
    official: type
    budget: type


class CacheSize(NamedTuple):
    """Tokens that a cache is made for: the prompt's, positions in all, and the length that RoPE is planned for."""

    prompt: int
    capacity: int
    rope_length: int


@dataclass(frozen=True)
class Full:
    """Every key is kept. `gamma` is the draft length asked for, None for auto."""

    gamma: int | None = None

    budget = None
    label = method = "full"
    positions = "absolute"
    chooses = False  # chunks of the prompt, once it is read
    reads_whole_prompt = True  # with full attention
    copied_layers = 0  # layers whose keys of the whole prompt exist besides the cache while it is read

    @property
    def gamma_max(self) -> int:
        """The longest draft, which sizes caches and bounds `--gamma auto`."""
        return gamma_limit(sys.maxsize, self.gamma)

    def view(self, prompt: int) -> FullView:  # noqa: ARG002
        return FULL

    def entries(self, size: CacheSize) -> int:
        """Entries per layer and KV head that the cache can hold."""
        return size.capacity

    def cache(self, kinds: CacheKinds, model: Model, size: CacheSize) -> BaseCache:
        return kinds.full(model, size.capacity, size.rope_length)


@dataclass(frozen=True)
class Window:
    """Sinks and the last keys, within `budget` entries."""

    budget: int
    positions: str = "rebased"
    gamma: int | None = None

    label = "window"
    method = "bd"
    chooses = False
    reads_whole_prompt = False

    @property
    def gamma_max(self) -> int:
        return gamma_limit(self.budget, self.gamma)

    def view(self, prompt: int) -> View:
        """The view after a prompt of `prompt` tokens. Raises UserError where the budget is too small."""
        return plan_view(self.budget, self.label, self.positions, self.gamma, prompt)

    def entries(self, size: CacheSize) -> int:
        """The budget, or what the whole text and a draft tail take where that is less."""
        return self._fitted(size).budget

    def cache(self, kinds: CacheKinds, model: Model, size: CacheSize) -> BaseCache:
        return kinds.budget(model, size.capacity, self._fitted(size), size.rope_length)

    def _fitted(self, size: CacheSize) -> View:
        return self.view(size.prompt).fitted(size.rope_length)


@dataclass(frozen=True)
class Chunk(Window):
    """As `Window`, and the prompt's best chunks besides."""

    label = "chunk"
    chooses = True


@dataclass(frozen=True)
class Official:
    """The paper's rule: chunks chosen once after the prompt; `budget` is no bound on what follows it."""

    budget: int
    gamma: int | None = None

    label = method = "official"
    positions = "absolute"
    chooses = True
    reads_whole_prompt = True
    copied_layers = 1

    @property
    def gamma_max(self) -> int:
        return gamma_limit(self.budget, self.gamma)

    def view(self, prompt: int) -> OfficialView:  # noqa: ARG002
        return OfficialView(self.budget)

    def entries(self, size: CacheSize) -> int:
        return min(self.budget, size.prompt) // CHUNK_KEYS * CHUNK_KEYS + size.capacity - size.prompt

    def cache(self, kinds: CacheKinds, model: Model, size: CacheSize) -> BaseCache:
        return kinds.official(model, size.capacity, self.budget, size.rope_length)


Selection = Full | Window | Chunk | Official


def parse_selection(
    budget: int | str | None, select: str = "window", positions: str = "rebased", gamma: int | str | None = None
) -> Selection:
    """The selection that flags, a recipe or a stored row name. Budget None or "full" is `Full`, gamma "auto" None.

    Whether a budget is large enough depends on γ and is found by `view`.
    """
    gamma = None if gamma == "auto" else gamma
    if budget in (None, "full") or select == "full":
        return Full(gamma)
    if select == "official":
        return Official(budget, gamma)
    return {"window": Window, "chunk": Chunk}[select](budget, positions, gamma)
