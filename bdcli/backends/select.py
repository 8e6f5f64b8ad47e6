"""What runs the forwards of decoding: Triton kernels in CUDA graphs on GPUs, compiled steps on processors they were
written for, torch everywhere else.

The choice is made once, said once, and stored with the run (`attention`); nothing falls back in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bdcli.base.errors import UserError
from bdcli.cache.budget import BudgetCache
from bdcli.cache.full import FullCache, OfficialCache
from bdcli.cache.view import View
from bdcli.model.llama import Model
from bdcli.speculation.speculator import Reader


@dataclass(frozen=True)
class Engine:
    """A kind of reader and the caches that go with it. `name` is triton, compiled or torch; `detail` is for people."""

    name: str
    detail: str
    reader: type[Reader]
    full: type[FullCache]
    official: type[OfficialCache]
    budget: type[BudgetCache]

    def target(self, model: Model, capacity: int, total: int) -> Reader:
        """`model` with a full cache for `capacity` positions; `total` is the length RoPE is planned for."""
        return self.reader(model, self.full(model, capacity, total))

    def drafter(
        self, model: Model, capacity: int, total: int, vocab: int, budget: int | None, view: View | None
    ) -> Reader:
        """`model` under a view; without one, under the paper's rule for `budget`, or with a full cache."""
        if view is not None:
            cache = self.budget(model, capacity, view, total)
        elif budget is not None:
            cache = self.official(model, capacity, budget, total)
        else:
            cache = self.full(model, capacity, total)
        return self.reader(model, cache, vocab)


def torch_engine(why: str = "asked for") -> Engine:
    return Engine("torch", why, Reader, FullCache, OfficialCache, BudgetCache)


def static_engine(name: str, detail: str) -> Engine:
    """Whole rounds as one program over static buffers (`bdcli.backends.cuda`)."""
    from bdcli.backends.cuda import caches
    from bdcli.backends.cuda.runner import StaticReader

    kinds = caches.StaticFullCache, caches.StaticOfficialCache, caches.StaticBudgetCache
    return Engine(name, detail, StaticReader, *kinds)


def pick_engine(wanted: str, models: list[Model], say: Callable[[str], None]) -> Engine:
    """`wanted` is auto, triton, compiled or torch. Raises UserError when one is asked for that cannot run."""
    if wanted == "torch":
        return torch_engine()
    name = wanted if wanted != "auto" else "triton" if models[0].device.type == "cuda" else "compiled"
    engine = _triton(models) if name == "triton" else _compiled(models, say)
    if isinstance(engine, Engine):
        return engine
    if wanted == "auto":
        return torch_engine(engine)
    raise UserError(f"--engine {wanted} cannot run here ({engine})", "Leave --engine out to decode with torch")


def _triton(models: list[Model]) -> Engine | str:
    """The engine, or why it cannot run."""
    from bdcli.backends.cuda import support

    why = support.obstacle(models)
    if why is not None:
        return why
    torch.cuda.set_device(models[0].device)  # kernels are launched on the current one
    return static_engine("triton", support.describe(models[0].device))


def _compiled(models: list[Model], say: Callable[[str], None]) -> Engine | str:
    """The engine, or why it cannot run."""
    from bdcli.backends.cpu import support

    why = support.obstacle(models)
    if why is not None:
        return why
    if not support.is_compiled():
        say("compiling for this processor, once: some 10 seconds")
    from bdcli.backends.cpu.caches import PanelBudgetCache, PanelFullCache, PanelOfficialCache
    from bdcli.backends.cpu.huge_pages import settle
    from bdcli.backends.cpu.runner import CompiledReader

    for model in models:
        settle(model)
    kinds = CompiledReader, PanelFullCache, PanelOfficialCache, PanelBudgetCache
    return Engine("compiled", support.describe(), *kinds)
