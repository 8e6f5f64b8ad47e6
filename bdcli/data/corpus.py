"""Token streams of a training mix, made once: each source's documents in random order, EOS after every one."""

from __future__ import annotations

import math
import random
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from bdcli.base.errors import UserError
from bdcli.base.files import digest
from bdcli.base.progress import SILENT, Progress
from bdcli.base.state import read_state, write_state
from bdcli.config.pretrain import PretrainRecipe
from bdcli.data.document import Unread
from bdcli.data.identity import sources_identity
from bdcli.data.prompts import encode_documents
from bdcli.data.sources import TOKEN_CHARACTERS, documents
from bdcli.data.synthetic import copied_ids

LONGEST_COPY_TOKENS = 4096  # and half the shortest window
_DOCUMENTS_AT_ONCE = 16  # given to the tokenizer together, which spreads them over cores


class Corpus:
    """Streams of one recipe. A window is the next stretch of one source's stream; a stream that ends starts again."""

    def __init__(self, recipe: PretrainRecipe, streams: list[Tensor]):
        self.shares = _shares(recipe)
        self.streams = streams

    def take(self, cursor: list[int], context: int, rows: int) -> Tensor:
        """Windows [rows, context]; `cursor`, the tokens taken from each source so far, moves on.

        The source that lags most behind its share is next, so the mix is exact and needs no randomness.
        """
        windows = []
        for _ in range(rows):
            total = sum(cursor) + context
            source = max(range(len(cursor)), key=lambda i: self.shares[i] * total - cursor[i])
            stream = self.streams[source]
            start = cursor[source] % (len(stream) - context + 1)
            windows.append(stream[start : start + context].long())
            cursor[source] += context
        return torch.stack(windows)


def make_corpus(recipe: PretrainRecipe, tokenizer, vocabulary: str, path: Path, progress: Progress = SILENT) -> Corpus:
    """The corpus of `recipe`, kept in the file `path`. `vocabulary` is a digest of the tokenizer.

    Raises UserError where a source holds no whole window.
    """
    s = recipe.schedule
    sources = sources_identity(recipe.corpus.sources)
    key = digest([asdict(recipe.corpus), sources, s.tokens, s.contexts, recipe.seed, vocabulary])
    if path.exists():
        return Corpus(recipe, read_state(path, key)["streams"])
    streams, unread = [], Unread()
    for source, share in zip(recipe.corpus.sources, _shares(recipe)):
        wanted = math.ceil(share * s.tokens) + 2 * max(s.contexts)
        streams.append(_stream(tokenizer, source, wanted, recipe.seed, unread, progress))
        if len(streams[-1]) < max(s.contexts):
            raise UserError(
                f"{source} holds {len(streams[-1])} training tokens, fewer than a window of {max(s.contexts)}",
                "Add text, or shorten schedule.contexts",
            )
    unread.note(progress)
    if recipe.corpus.copies:
        wanted = math.ceil(recipe.corpus.copies * s.tokens) + 2 * max(s.contexts)
        rng, longest = random.Random(f"copies {recipe.seed}"), min(LONGEST_COPY_TOKENS, min(s.contexts) // 2)
        streams.append(torch.tensor(copied_ids(rng, ordinary_ids(tokenizer), wanted, longest), dtype=torch.int32))
    write_state(path, key, {"streams": streams})
    return Corpus(recipe, streams)


def ordinary_ids(tokenizer) -> list[int]:
    """Ids of the vocabulary that are not special tokens."""
    return sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))


def _shares(recipe: PretrainRecipe) -> list[float]:
    """Share of tokens of each source, and of copies where there are any."""
    c = recipe.corpus
    weights = c.weights or (1.0,) * len(c.sources)
    return [(1 - c.copies) * w / sum(weights) for w in weights] + [c.copies] * (c.copies > 0)


def _stream(tokenizer, source: str, wanted: int, seed: int, unread: Unread, progress: Progress) -> Tensor:
    found = documents(source, unread, TOKEN_CHARACTERS * wanted)
    docs = [d.text for d in found if d.text and not d.held_out]
    random.Random(seed).shuffle(docs)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    parts, size = [], 0
    for at in range(0, len(docs), _DOCUMENTS_AT_ONCE):
        for ids in encode_documents(tokenizer, docs[at : at + _DOCUMENTS_AT_ONCE]):
            parts.append(torch.tensor(ids + end, dtype=torch.int32))
            size += len(parts[-1])
        progress.advance(f"tokens of {Path(source).name}", min(size, wanted), wanted)
        if size >= wanted:
            break
    return torch.cat(parts)[:wanted].clone() if parts else torch.empty(0, dtype=torch.int32)
