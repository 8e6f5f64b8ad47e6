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
from bdcli.cache.full import FullCache
from bdcli.cache.official import OfficialCache
from bdcli.cache.view import View
from bdcli.model.llama import Model
from bdcli.speculation.speculator import Runner


@dataclass(frozen=True)
class Backend:
    """A kind of runner and the caches that go with it. `name` is triton, compiled or torch; `detail` is for people."""

    name: str
    detail: str
    runner: type[Runner]
    full: type[FullCache]
    official: type[OfficialCache]
    budget: type[BudgetCache]

    def target(self, model: Model, capacity: int, total: int) -> Runner:
        """`model` with a full cache for `capacity` positions; `total` is the length RoPE is planned for."""
        return self.runner(model, self.full(model, capacity, total))

    def drafter(
        self, model: Model, capacity: int, total: int, vocab: int, budget: int | None, view: View | None
    ) -> Runner:
        """`model` under a view; without one, under the paper's rule for `budget`, or with a full cache."""
        if view is not None:
            cache = self.budget(model, capacity, view, total)
        elif budget is not None:
            cache = self.official(model, capacity, budget, total)
        else:
            cache = self.full(model, capacity, total)
        return self.runner(model, cache, vocab)


def torch_backend(why: str = "asked for") -> Backend:
    return Backend("torch", why, Runner, FullCache, OfficialCache, BudgetCache)


def static_backend(name: str, detail: str) -> Backend:
    """Whole rounds as one program over static buffers (`bdcli.backends.cuda`)."""
    from bdcli.backends.cuda import caches
    from bdcli.backends.cuda.runner import StaticRunner

    kinds = caches.StaticFullCache, caches.StaticOfficialCache, caches.StaticBudgetCache
    return Backend(name, detail, StaticRunner, *kinds)


def pick_backend(wanted: str, models: list[Model], say: Callable[[str], None]) -> Backend:
    """`wanted` is auto, triton, compiled or torch. Raises UserError when one is asked for that cannot run."""
    if wanted == "torch":
        return torch_backend()
    name = wanted if wanted != "auto" else "triton" if models[0].device.type == "cuda" else "compiled"
    engine = _triton(models) if name == "triton" else _compiled(models, say)
    if isinstance(engine, Backend):
        return engine
    if wanted == "auto":
        return torch_backend(engine)
    raise UserError(f"--engine {wanted} cannot run here ({engine})", "Leave --engine out to decode with torch")


def _triton(models: list[Model]) -> Backend | str:
    """The engine, or why it cannot run."""
    from bdcli.backends.cuda import support

    why = support.obstacle(models)
    if why is not None:
        return why
    torch.cuda.set_device(models[0].device)  # kernels are launched on the current one
    return static_backend("triton", support.describe(models[0].device))


def _compiled(models: list[Model], say: Callable[[str], None]) -> Backend | str:
    """The engine, or why it cannot run."""
    from bdcli.backends.cpu import support

    why = support.obstacle(models)
    if why is not None:
        return why
    if not support.is_compiled():
        say("compiling for this processor, once: some 10 seconds")
    from bdcli.backends.cpu.caches import PanelBudgetCache, PanelFullCache, PanelOfficialCache
    from bdcli.backends.cpu.huge_pages import move_to_huge_pages
    from bdcli.backends.cpu.runner import CompiledRunner

    for model in models:
        move_to_huge_pages(model)
    kinds = CompiledRunner, PanelFullCache, PanelOfficialCache, PanelBudgetCache
    return Backend("compiled", support.describe(), *kinds)
