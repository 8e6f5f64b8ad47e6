"""Loss on held-out text, and what a long context is worth: the tail of a window read whole, and read cut short."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bdcli.model.llama import Model
from bdcli.model.rope import RopeTable
from bdcli.train.forward import causal_block, causal_hidden
from bdcli.train.losses import head_loss
from bdcli.train.targets import ArgmaxTarget

SHORT_TOKENS = 256  # what "no long context" means: tokens seen by the first of SHORT_ROWS predicted together
SHORT_ROWS = 64
PIECES_AT_ONCE = 64  # cut texts read side by side
TAIL_TOKENS = 1024  # last tokens of a window, over which the worth of a long context is measured


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss at one context, nats a token: of whole windows, of their tails given everything, and given ~256 tokens."""

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
    default they are consecutive.
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


def window_losses(
    model: Model, window: Tensor, dtype: torch.dtype, short_rows: int = SHORT_ROWS
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [T - 1] of a window [T], and those of its tail given everything, [tail], and given little, [tail].

    Little is the last SHORT_TOKENS to SHORT_TOKENS + short_rows - 1 tokens: fewer rows are closer to SHORT_TOKENS and
    cost more forwards. `short_rows` divides TAIL_TOKENS.
    """
    tail = min(TAIL_TOKENS, len(window) - SHORT_TOKENS) // short_rows * short_rows
    whole = token_losses(model, window[None], dtype)[0]
    pieces = window[-tail - SHORT_TOKENS :].unfold(0, SHORT_TOKENS + short_rows, short_rows).split(PIECES_AT_ONCE)
    short = torch.cat([token_losses(model, some, dtype)[:, -short_rows:].flatten() for some in pieces])
    return whole, whole[-tail:], short


def measure(model: Model, windows: Tensor, context: int, dtype: torch.dtype) -> HeldOutLoss:
    """Held-out loss of the last `context` tokens of windows [N, T], on the model's device."""
    losses = [window_losses(model, window, dtype) for window in windows[:, -context:].to(model.device)]
    nll, tail, short = (float(torch.stack(x).mean()) for x in zip(*losses))
    return HeldOutLoss(context, len(losses), nll, tail, short)
