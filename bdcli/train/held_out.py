"""Loss on held-out text, and what a long context is worth: the tail of a window read whole, and read cut short."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bdcli.model import Model
from bdcli.rope import RopeTable
from bdcli.train.losses import ArgmaxTarget, head_loss
from bdcli.train.view_forward import causal_block, causal_hidden

SHORT = 256  # what "no long context" means: tokens seen by the first of SHORT_ROWS predicted together
SHORT_ROWS = 64
TAIL = 1024  # last tokens of a window, over which the worth of a long context is measured


@dataclass(frozen=True)
class Measured:
    """Held-out loss at one context, nats a token: whole window; its tail given everything; given the last ~256."""

    context: int
    windows: int
    nll: float
    tail_nll: float
    tail_nll_short: float


def next_token_rows(
    model: Model, windows: Tensor, dtype: torch.dtype, block=causal_block, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Normed last hidden states [N·(T - 1), hidden] of windows [N, T] but the last position, and the ids that follow.

    `dtype` is what products run in; weights may be fp32. `positions` [T] are rising places of a window's tokens; by
    default they stand side by side.
    """
    c, device = model.config, windows.device
    length = windows.shape[1] if positions is None else int(positions[-1]) + 1
    rope = RopeTable(c.rope, length, length, dtype, device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        x = causal_hidden(model, rope, windows, block, positions)
    x = F.rms_norm(x, (c.hidden_size,), model.norm, c.norm_eps).to(dtype)
    return x[:, :-1].reshape(-1, c.hidden_size), windows[:, 1:].reshape(-1)


@torch.no_grad()
def token_losses(model: Model, windows: Tensor, dtype: torch.dtype) -> Tensor:
    """Loss [N, T - 1] of each token of windows [N, T] but the first."""
    x, following = next_token_rows(model, windows, dtype)
    return head_loss(x, model.head, ArgmaxTarget(following), "ce")[1].losses.view(len(windows), -1)


def measure(model: Model, windows: Tensor, context: int, dtype: torch.dtype) -> Measured:
    """Held-out loss of the last `context` tokens of windows [N, T], on the model's device."""
    whole, tails, short = [], [], []
    tail = min(TAIL, context - SHORT) // SHORT_ROWS * SHORT_ROWS
    for window in windows[:, -context:].to(model.device):
        losses = token_losses(model, window[None], dtype)[0]
        whole.append(losses.mean())
        tails.append(losses[-tail:].mean())
        pieces = window[-tail - SHORT :].unfold(0, SHORT + SHORT_ROWS, SHORT_ROWS)
        short.append(token_losses(model, pieces, dtype)[:, -SHORT_ROWS:].mean())
    nll, tail_nll, tail_short = (float(torch.stack(x).mean()) for x in (whole, tails, short))
    return Measured(context, len(whole), nll, tail_nll, tail_short)
