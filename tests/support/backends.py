"""Runners and drafters of any backend, also under views that no budget plans."""

from __future__ import annotations

from dataclasses import dataclass

from bdcli.backends.select import Backend
from bdcli.cache.selection import CacheKinds, CacheSize, Full, Official, Selection
from bdcli.cache.view import View
from bdcli.model.llama import Model
from bdcli.speculation.drafter import ModelDrafter


@dataclass(frozen=True)
class GivenView:
    """A selection whose view does not depend on the prompt."""

    given: View

    def cache(self, kinds: CacheKinds, model: Model, size: CacheSize):
        return kinds.budget(model, size.capacity, self.given, size.rope_length)


SELECTIONS = {
    "full": Full(),
    "official": Official(64),
    "window": GivenView(View(52, 4, 0, 9, True)),
    "window absolute": GivenView(View(52, 4, 0, 9, False)),
    "chunk": GivenView(View(60, 4, 16, 9, True)),
    "no sinks": GivenView(View(40, 0, 0, 9, True)),
}


def drafter(
    backend: Backend, model: Model, selection: Selection | GivenView, capacity: int, vocab: int | None = None
) -> ModelDrafter:
    """`model` drafting from a cache of `capacity` positions."""
    size = CacheSize(0, capacity, capacity)
    return backend.drafter(model, selection, size, vocab or model.config.vocab_size)
