"""Whether these models can decode in Triton kernels and CUDA graphs here, without importing triton."""

from __future__ import annotations

import importlib.util

import torch

from bdcli.base.devices import dtype_name
from bdcli.model.llama import Model

HEAD_DIMS = (64, 96, 128)  # that the kernels are compiled and tested for (`bd_kernels.variants`)
OLDEST = (8, 0)  # compute capability: bf16 tensor cores
OLDEST_TORCH = "2.8"  # events that a CUDA graph records for the host


def obstacle(models: list[Model]) -> str | None:
    """Why the Triton engine cannot run, in a few words; None when it can."""
    device = models[0].device
    if device.type != "cuda":
        return f"{device.type} device"
    if torch.__version__ < OLDEST_TORCH:
        return f"torch {torch.__version__}, older than {OLDEST_TORCH}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return "compute capability {}.{}, below {}.{}".format(*torch.cuda.get_device_capability(device), *OLDEST)
    return next((why for why in map(_shape, models) if why), None)


def _shape(model: Model) -> str | None:
    if model.dtype not in (torch.bfloat16, torch.float16):
        return dtype_name(model.dtype)
    dim = model.config.head_dim
    return None if dim in HEAD_DIMS else f"head dimension {dim} is none of {', '.join(map(str, HEAD_DIMS))}"


def describe(device: torch.device) -> str:
    from triton import __version__

    return f"triton {__version__}, one CUDA graph a round, {torch.cuda.get_device_name(device)}"
