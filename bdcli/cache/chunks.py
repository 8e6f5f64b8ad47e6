"""Which chunks of the prompt a drafter keeps. Pure functions of one layer's keys; the caches call them once."""

from __future__ import annotations

import torch
from torch import Tensor

SCORING_QUERIES = 16  # last prompt queries whose mean scores the chunks


def chunk_scores(queries: Tensor, keys: Tensor, chunk: int) -> Tensor:
    """Scores [Hkv, C] of C whole chunks: mean of the last queries · mean key of the chunk / √D, summed over the group.

    queries [m, H, D], keys [C·chunk, Hkv, D], both rotated.
    """
    heads, dim = queries.shape[1:]
    kv_heads = keys.shape[1]
    query = queries.float().mean(0).view(kv_heads, heads // kv_heads, dim).sum(1)
    centre = keys.float().view(-1, chunk, kv_heads, dim).mean(1)
    return torch.einsum("hd,chd->hc", query, centre) * dim**-0.5


def choose_chunks(scores: Tensor, count: int, chunk: int) -> Tensor:
    """Entry indices [Hkv, count·chunk] of the best `count` chunks per head, in text order."""
    best = scores.topk(count, dim=1).indices.sort(dim=1).values
    return (best[:, :, None] * chunk + torch.arange(chunk, device=scores.device)).flatten(1)


def prompt_chunks(rope, view, queries: Tensor, keys: Tensor, raw_keys: Tensor) -> Tensor:
    """Positions [Hkv, view.chosen] that a `chunk` view keeps of a prompt of n tokens, between its sinks and its window.

    queries [m, H, D]: the prompt's last, rotated as they will look at chosen chunks; keys [n, Hkv, D] rotated at their
    positions, raw_keys unrotated. With rebased positions each chunk is scored as if it stood amid the chosen ones.
    """
    end, size = keys.shape[0] - view.window, view.chunk_keys
    first = view.sinks + (end - view.sinks) % size  # whole chunks, aligned to where the window starts
    candidates = keys[first:end]
    if view.rebased:
        rank = torch.arange(size, device=keys.device) + view.sinks + (view.chosen - size) // 2
        candidates = rope.rotate(raw_keys[first:end], rope.rows(rank.repeat((end - first) // size)))
    return choose_chunks(chunk_scores(queries, candidates, size), view.chosen // size, size) + first


def official_chunks(keys: Tensor, budget: int, chunk: int) -> Tensor:
    """The paper's rule (arXiv 2606.00144): indices [Hkv, K] into post-RoPE prefix keys [n, Hkv, D].

    score = last prefix key · mean key of the chunk, no 1/√D; chunk 0 always kept, then the top budget/chunk - 1;
    what follows the last whole chunk is lost. K = chunk · min(budget, n) // chunk.
    """
    whole = keys.shape[0] // chunk
    count = min(budget // chunk, whole)
    if count == 0:
        return torch.zeros(keys.shape[1], 0, dtype=torch.long, device=keys.device)
    centre = keys[: whole * chunk].float().view(whole, chunk, *keys.shape[1:]).mean(1)
    scores = torch.einsum("hd,chd->hc", keys[-1].float(), centre)
    scores[:, 0] = torch.inf
    return choose_chunks(scores, count, chunk)
