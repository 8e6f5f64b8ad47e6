"""What distilling will hold on its device, in bytes, from configurations alone; tested against what is allocated."""

from __future__ import annotations

from collections.abc import Sequence

from bdcli.cache.view import FULL, FullView, View
from bdcli.model.config import ModelConfig
from bdcli.model.llama import PREFILL_BLOCK
from bdcli.model.sizes import gigabytes, weight_count
from bdcli.train.forward import MAX_BLOCK, MIN_BLOCK
from bdcli.train.losses import LOGIT_ROWS

MOMENTS = 8  # bytes a parameter of AdamW; Muon keeps half of them


def distill_memory(
    target: ModelConfig,
    drafter: ModelConfig,
    tokens: int,
    views: Sequence[View | FullView],
    anchored: Sequence[int],
    size: int,
    chunk: int = LOGIT_ROWS,
) -> dict[str, int]:
    """Bytes by what holds them, of a step over one window of `tokens` under `views` of the drafter.

    `anchored`: lengths of the texts that are read besides, one for each anchor and budget. size: bytes of a number of
    the target and of products; the drafter's own weights are fp32. `chunk`: rows whose logits live at once.
    """
    parameters = weight_count(drafter)
    return {
        "target": size * weight_count(target),
        "drafter, gradients, moments": (4 + 4 + MOMENTS + size) * parameters,  # and its copy in the products' dtype
        "target's forward": size * target_forward(target, tokens),
        "drafter's activations": sum(_layers(drafter, tokens, view, size) for view in views)
        + sum(_layers(drafter, length, FULL, size) for length in anchored),
        "loss": _loss(target, drafter, tokens, (len(views) + len(anchored)), size, chunk),
    }


def memory_line(parts: dict[str, int]) -> str:
    """For people: the sum of `distill_memory`, and its parts."""
    listed = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())
    return f"memory about {gigabytes(sum(parts.values()))}: {listed}"


def target_forward(c: ModelConfig, tokens: int) -> int:
    """Numbers alive in `final_rows`: residual stream, one layer's q, k, v and output, a block of its MLP."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return tokens * (2 * c.hidden_size + 3 * (q + kv) + kv + q) + 4 * min(tokens, PREFILL_BLOCK) * c.intermediate_size


def _layers(c: ModelConfig, tokens: int, view: View | FullView, size: int) -> int:
    """Bytes that all layers of one view keep for the way back; the residual stream is fp32."""
    q, kv, mlp = c.heads * c.head_dim, c.kv_heads * c.head_dim, c.intermediate_size
    wide = 0 if size == 4 else 4  # what autocast makes of an fp32 value is another copy
    stream = (4 * 4 + 2 * (wide and size)) * c.hidden_size
    rows = size * (q + 2 * kv + 2 * (q + kv) + 2 * q + 5 * mlp)
    copies = size * (q + 2 * kv) if view.covers(tokens) else size * _banded(c, view)
    return c.layers * tokens * (stream + rows + copies)


def _banded(c: ModelConfig, view: View) -> int:
    """Numbers a row of banded attention keeps: query, output, and key and value once for each block that sees them."""
    block = min(max(view.window, MIN_BLOCK), MAX_BLOCK)
    times = 1 + -(-(view.window - 1) // block) + view.sinks / block
    width = 2 if view.rebased else 1
    return round(width * c.head_dim * (2 * c.heads + 3 * times * c.kv_heads))


def _loss(target: ModelConfig, drafter: ModelConfig, tokens: int, views: int, size: int, chunk: int) -> int:
    """Bytes: the head's gradient in fp32 twice, rows with their gradients, and chunks of logits."""
    rows = tokens * (target.hidden_size * size + views * drafter.hidden_size * (4 + 3 * size))
    return 2 * 4 * drafter.vocab_size * drafter.hidden_size + rows + 5 * 4 * chunk * drafter.vocab_size
