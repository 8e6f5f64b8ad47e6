"""The schema of a pretrain recipe. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from bdcli.config.optimizer import Updates
from bdcli.config.settings import NON_NEGATIVE, SEED, above, at_least, setting, within


@dataclass(frozen=True)
class Shape:
    """The model that is made where no `init` is given."""

    layers: int = setting(12, "decoder layers", above(0))
    hidden_size: int = setting(256, "width of the residual stream", above(0))
    intermediate_size: int = setting(704, "width of the MLP", above(0))
    heads: int = setting(4, "query heads", above(0))
    kv_heads: int = setting(4, "key and value heads", above(0))
    max_position: int = setting(16896, "longest text, prompt and new tokens together", above(0))
    rope_theta: float = setting(500000.0, "RoPE base", above(0))
    vocab_size: int = setting(4096, "entries of a tokenizer trained here", above(0))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads


@dataclass(frozen=True)
class Corpus:
    """The mix of texts that is read."""

    sources: tuple[str, ...] = setting(
        ("stdlib",), "stdlib, recall, text files, .jsonl, .parquet, tars of texts, folders, hub data sets"
    )
    weights: tuple[float, ...] = setting((), "share of tokens from each source; empty is equal shares")
    copies: float = setting(0.0, "share of tokens, beside the sources, that are repeated random ids: teaches copying")
    guide: float = setting(
        0.0, "share of the run, at its start, in which two heads are shown where to look in copies; for few layers"
    )


@dataclass(frozen=True)
class Schedule:
    """How much is read, in windows of which length, and the learning rate over it."""

    tokens: int = setting(20_000_000, "tokens to read in all", above(0))
    contexts: tuple[int, ...] = setting((1024, 4096), "window length of each stage, one after another")
    shares: tuple[float, ...] = setting((0.8, 0.2), "share of the run that each stage takes")
    reach: int = setting(
        0,
        "positions that shorter windows are spread over, in half the steps, by one skip (PoSE); 0 never skips",
        at_least(0, NON_NEGATIVE),
    )
    tokens_per_step: int = setting(
        16384, "tokens whose gradients make one step; a longer window is a step of its own", above(0)
    )
    micro_tokens: int = setting(8192, "tokens that go through the model at once; a longer window goes alone", above(0))
    warmup: float = setting(0.02, "share of the run over which the learning rate rises", within(0, 1))
    decay: float = setting(0.6, "share of the run, at its end, over which it falls to zero", within(0, 1))
    follow: Literal["tokens", "time"] = setting(
        "tokens", "what share of the run is done: tokens read, or the larger of that and the share of --max-minutes"
    )


@dataclass(frozen=True)
class HeldOut:
    """The texts that measure the loss."""

    sources: tuple[str, ...] = setting((), "texts to measure on; empty takes the held-out documents of corpus.sources")
    contexts: tuple[int, ...] = setting((2048,), "lengths at which the loss is measured")
    documents: int = setting(8, "held-out documents, one window each", above(0))
    every: int = setting(200, "steps between measurements", above(0))


@dataclass(frozen=True)
class MuonUpdates(Updates):
    """Defaults for training from random weights."""

    method: Literal["adamw", "muon"] = setting("muon", "muon orthogonalises the updates of matrices inside layers")
    lr: float = setting(4e-3, "peak learning rate", above(0))
    vector_lr: float | None = setting(
        2e-3, "with muon: AdamW's rate for embedding, head and norms; none is lr", above(0)
    )


@dataclass(frozen=True)
class PretrainRecipe:
    """A pretrain run: which model it starts from, and what it reads."""

    init: str | None = setting(None, "model to start from; none starts from random weights of `shape`")
    layers: int | None = setting(
        None, "layers taken of init, the first ones; beyond its own, new ones that change nothing at first"
    )
    tokenizer: str | None = setting(None, "model whose tokenizer is taken; none takes that of init, or trains one")
    seed: int = setting(0, "seed of weights and data order", SEED)
    device: str = setting("auto", "auto, cpu, cuda")
    precision: Literal["auto", "float32", "bfloat16"] = setting("auto", "auto: bf16 where its products are faster")
    compile: bool = setting(
        False, "torch.compile of a layer: slow to start, then faster; needs a C++ compiler on a CPU"
    )
    checkpoint_minutes: float = setting(5.0, "minutes between checkpoints", above(0))
    shape: Shape = field(default_factory=Shape)
    corpus: Corpus = field(default_factory=Corpus)
    schedule: Schedule = field(default_factory=Schedule)
    optimizer: MuonUpdates = field(default_factory=MuonUpdates)
    held_out: HeldOut = field(default_factory=HeldOut)

    def problems(self) -> Iterator[tuple[str, str]]:
        """(key, message) of values that do not fit together."""
        c, s, h = self.corpus, self.schedule, self.held_out
        if not c.sources:
            yield "corpus.sources", "must name at least one source"
        if c.weights and (len(c.weights) != len(c.sources) or min(c.weights) < 0 or sum(c.weights) <= 0):
            yield "corpus.weights", f"must be {len(c.sources)} non-negative numbers, one for each of corpus.sources"
        if not 0 <= c.copies < 1:
            yield "corpus.copies", "must lie in 0 .. 1, below 1"
        if not 0 <= c.guide <= 1 or (c.guide and not c.copies):
            yield "corpus.guide", "must lie in 0 .. 1, and needs corpus.copies"
        if len(s.shares) != len(s.contexts) or not s.shares or min(s.shares) < 0 or sum(s.shares) <= 0:
            yield "schedule.shares", f"must be {len(s.contexts)} non-negative numbers, one for each stage"
        for context in s.contexts:
            if context < 16 or (context < s.tokens_per_step and s.tokens_per_step % context):
                yield "schedule.contexts", f"{context} must be at least 16 and divide schedule.tokens_per_step"
        if self.layers is not None and (self.init is None or self.layers <= 0):
            yield "layers", "must be above 0, and is for a model that starts from init; else give shape.layers"
        if self.shape.heads % max(1, self.shape.kv_heads) or self.shape.hidden_size % max(1, 2 * self.shape.heads):
            yield "shape.heads", "must divide hidden_size into even head sizes and be a multiple of kv_heads"
        if not h.contexts or min(h.contexts) < 320:
            yield "held_out.contexts", "must be at least 320 tokens each"
