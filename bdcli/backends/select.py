"""What runs the forwards of decoding: Triton kernels in CUDA graphs on GPUs, compiled steps on processors they were
written for, torch everywhere else; on request a target of `transformers`, which may be of any family.

The choice is made once, reported once, and stored with the run (`attention`); nothing falls back in silence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bdcli.base.errors import UserError
from bdcli.base.progress import Progress
from bdcli.cache.kinds import TORCH_CACHES
from bdcli.cache.selection import CacheKinds, CacheSize, Full, Selection
from bdcli.model.llama import Model
from bdcli.speculation.drafter import ModelDrafter
from bdcli.speculation.runner import Runner


@dataclass(frozen=True)
class Backend:
    """The runner, drafter and caches that go together. `name` is triton, compiled or torch; `detail` is for people."""

    name: str
    detail: str
    runner_type: type[Runner]
    drafter_type: type[ModelDrafter]
    caches: CacheKinds
    plans_memory = True  # `decode_plan` knows what it will hold

    def target(self, model: Model, size: CacheSize) -> Runner:
        """`model` with a full cache."""
        return self.runner_type(model, Full().cache(self.caches, model, size))

    def drafter(
        self, model: Model, selection: Selection, size: CacheSize, vocab: int, own: bool = False
    ) -> ModelDrafter:
        """`model` with what `selection` keeps; logits line up with a target of `vocab` tokens.

        `own`: the model is the target itself, perhaps in fewer bits.
        """
        return self.drafter_type(self.runner_type(model, selection.cache(self.caches, model, size), vocab), own)


def torch_backend(why: str = "asked for") -> Backend:
    return Backend("torch", why, Runner, ModelDrafter, TORCH_CACHES)


def static_backend(name: str, detail: str) -> Backend:
    """Whole rounds as one program over static buffers (`bdcli.backends.cuda`)."""
    from bdcli.backends.cuda.caches import STATIC_CACHES
    from bdcli.backends.cuda.runner import StaticRunner

    return Backend(name, detail, StaticRunner, ModelDrafter, STATIC_CACHES)


def pick_backend(requested: str, models: list[Model], progress: Progress) -> Backend:
    """`requested` is auto or the name of a backend. Raises UserError when one is asked for that cannot run."""
    if requested == "torch":
        return torch_backend()
    if requested == "transformers":
        from bdcli.backends.transformers_engine import transformers_backend

        return transformers_backend(*models, progress)
    name = requested if requested != "auto" else "triton" if models[0].device.type == "cuda" else "compiled"
    backend = _triton(models) if name == "triton" else _compiled(models, progress)
    if isinstance(backend, Backend):
        return backend
    if requested == "auto":
        return torch_backend(backend)
    raise UserError(f"--engine {requested} cannot run here ({backend})", "Leave --engine out to decode with torch")


def _triton(models: list[Model]) -> Backend | str:
    """The backend, or why it cannot run."""
    from bdcli.backends.cuda import support

    why = support.obstacle(models)
    if why is not None:
        return why
    torch.cuda.set_device(models[0].device)  # kernels are launched on the current one
    return static_backend("triton", support.describe(models[0].device))


def _compiled(models: list[Model], progress: Progress) -> Backend | str:
    """The backend, or why it cannot run."""
    from bdcli.backends.cpu.machine import support

    why = support.obstacle(models)
    if why is not None:
        return why
    if not support.is_compiled():
        progress.note("compiling for this processor, once: some 10 seconds")
    from bdcli.backends.cpu.caches import PANEL_CACHES
    from bdcli.backends.cpu.drafter import CompiledDrafter
    from bdcli.backends.cpu.machine.huge_pages import move_to_huge_pages
    from bdcli.backends.cpu.runner import CompiledRunner

    move_to_huge_pages(models)
    return Backend("compiled", support.describe(), CompiledRunner, CompiledDrafter, PANEL_CACHES)
