"""Showing a shallow model how to copy: two attention heads are shown where to look, until they do it by themselves.

Copying what followed the last time takes two heads in different layers: one that looks at the previous token, and an
induction head after it that looks for places whose previous token is the present one (Olsson et al. 2022). Each is
worth nothing without the other, so a model of two layers may not find them in millions of tokens
(docs/log/2026-11-24-copy-alone.md).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bdcli.data.synthetic import copied_ids
from bdcli.model.llama import Model
from bdcli.model.rope import RopeTable
from bdcli.train.forward import causal_block

LESSON_WINDOWS, LESSON_TOKENS = 12, 256  # rows of a lesson, and ids in each
LONGEST_COPY_TOKENS = 100  # of a sequence that a lesson repeats
GUIDE_WEIGHT = 0.3  # of a lesson's loss beside the next-token loss


def lesson(seed: int, step: int, vocabulary: Sequence[int]) -> Tensor:
    """Ids [LESSON_WINDOWS, LESSON_TOKENS] of repeated random sequences, a function of (seed, step)."""
    rng, size = random.Random(f"lesson {seed} {step}"), LESSON_WINDOWS * LESSON_TOKENS
    ids = copied_ids(rng, vocabulary, size, LONGEST_COPY_TOKENS)
    return torch.tensor(ids).view(LESSON_WINDOWS, LESSON_TOKENS)


def guide_loss(model: Model, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """-log of the attention that two heads pay where they should, each a mean over positions of ids [N, T], in nats.

    The first head of the first layer should look at the previous token; that of the last layer at tokens that followed
    earlier occurrences of the present one, where there are any. Raises ValueError on a model of one layer.
    """
    c, (texts, length) = model.config, ids.shape
    if c.layers < 2:
        raise ValueError("copying takes two layers")
    rope = RopeTable(c.rope, length, length, dtype, model.device)
    cos, sin = rope.rows(slice(0, length))
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        x = F.embedding(ids.flatten(), model.embedding)
        first = _first_head(model, model.layers[0], x, rope, texts)
        for layer in model.layers[:-1]:
            x = causal_block(model, layer, x, cos, sin, texts)
        last = _first_head(model, model.layers[-1], x, rope, texts)
    after = F.pad(ids[:, :, None] == ids[:, None, :-1], (1, 0)).tril()  # [N, query, key]: did key follow that token?
    induced = last.masked_fill(~after, -torch.inf)[after.any(-1)].logsumexp(-1)
    previous = first[:, 1:].diagonal(0, 1, 2)
    return -(previous.mean() + induced.mean())


def _first_head(model: Model, layer, x: Tensor, rope: RopeTable, texts: int) -> Tensor:
    """Log attention [N, T, T] of a layer's first query head, fp32."""
    qk, _ = model.project(layer, x)
    rotated = rope.rotate(qk.unflatten(0, (texts, -1)), rope.rows(slice(0, x.shape[0] // texts)))
    q, k = rotated[:, :, 0], rotated[:, :, model.config.heads]
    scores = (q @ k.mT).float() * model.config.head_dim**-0.5
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf).log_softmax(-1)
