"""The schema of a distil recipe: every setting with its type, default and meaning. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from bdcli.cache.view import GAMMA_MAX, SINKS
from bdcli.config.optimizer import Updates
from bdcli.config.settings import NON_NEGATIVE, SEED, TRAINED_TEMPERATURE, above, at_least, setting, within


@dataclass(frozen=True)
class Data:
    """Training windows: what they are cut from, and what the target adds to them."""

    sources: tuple[str, ...] = setting(
        ("stdlib",),
        "stdlib, recall, pg19, lwm, longbench, longbench/TASK, a .txt, .jsonl, .parquet or tar, a folder of them, or a "
        "hub data set; NAME=PLACE names one",
    )
    context: int = setting(4096, "tokens of a training window", above(0))
    windows: int = setting(64, "training windows; steps beyond them start another pass in another order", above(0))
    written: float = setting(
        0.5, "share of windows whose end is written by the target at the serving temperature", within(0, 1)
    )
    written_tokens: int = setting(256, "length of that end")
    written_temperature: float | None = setting(
        None, "temperature it is written at; none is the serving temperature", TRAINED_TEMPERATURE
    )
    together: int = setting(
        8, "texts written at once where the target's products are shared (not in compiled steps)", above(0)
    )
    max_loop_rate: float = setting(0.25, "a window whose written end loops more is dropped", at_least(0, NON_NEGATIVE))
    cache: Literal["none", "hidden", "topk", "argmax"] = setting(
        "none", "the target's answers kept on disk: hidden states, top-k and the tail's mass, or its choices"
    )
    top_k: int = setting(64, "tokens a position of `topk`", above(0))
    shard_windows: int = setting(16, "windows of a shard, which is made or missing as a whole", above(0))


@dataclass(frozen=True)
class Views:
    """Under which budgets the drafter learns, and which positions teach it."""

    mode: Literal["sandwich", "sampled", "full"] = setting(
        "sandwich", "sandwich: full + smallest + largest + one log-uniform budget; sampled: full + one; full: full only"
    )
    budgets: tuple[int, ...] = setting((256, 512, 1024, 2048), "KV budgets; sandwich draws between the outermost")
    weights: tuple[float, ...] = setting((), "probabilities of the budgets in `sampled`; empty is uniform")
    positions: Literal["rebased", "absolute"] = setting("rebased", "places of kept keys, as in decode")
    select: Literal["window", "chunk", "official"] = setting(
        "window", "window views train every position; chunk and official ones what follows the anchors"
    )
    anchors: tuple[int, ...] = setting((), "prompt lengths at which chunks are chosen; empty is 1K, 2K, 4K, ...")
    anchor_tokens: int = setting(256, "tokens taught after each anchor", above(0))
    teach: Literal["all", "anchored"] = setting("all", "positions of the full branch: all, or those after anchors")
    prefix_gradients: Literal["full", "selected", "none"] = setting(
        "full", "what keys and values before an anchor learn: all layers, kept ones one layer deep, nothing"
    )


@dataclass(frozen=True)
class Loss:
    """How far the drafter is from the target (`bdcli.train.losses`)."""

    kind: Literal["ce", "kl", "log_alpha", "lk"] = setting(
        "kl", "ce on the target's argmax, forward KL, -log acceptance, LK hybrid"
    )
    sparse_weight: float = setting(1.0, "λ in L = L_A + λ·L_C; the full branch has weight 1", at_least(0, NON_NEGATIVE))
    temperature: float = setting(1.0, "softmax temperature of both sides in the loss", within(0.01, 100))
    weights: Literal["uniform", "accepted_length"] = setting(
        "uniform", "accepted_length weighs each position by what it adds to the expected accepted length"
    )


@dataclass(frozen=True)
class Optimizer(Updates):
    """Steps and their learning rate."""

    steps: int = setting(150, "optimizer steps", above(0))
    windows_per_step: int = setting(1, "windows whose gradients make one step", above(0))
    warmup: int = setting(10, "linear warm-up steps; a cosine to zero follows", at_least(0, NON_NEGATIVE))
    follow: Literal["steps", "time"] = setting(
        "steps", "where the cosine stands: at the step, or further on where --max-minutes is nearer than the last step"
    )


@dataclass(frozen=True)
class Evaluation:
    """The grid of acceptance on held-out passages that judges a drafter."""

    sources: tuple[str, ...] = setting((), "texts to measure on; empty takes the held-out documents of data.sources")
    every: int = setting(50, "steps between measurements of the acceptance grid", above(0))
    patience: int | None = setting(
        None,
        "measurements without a better acceptance after which training stops; none trains to the last step",
        above(0),
    )
    contexts: tuple[int, ...] = setting((1024, 4096), "prompt lengths of the held-out passages")
    budgets: tuple[int | Literal["full"], ...] = setting((256, 512, 1024, 2048, "full"), "budgets of the grid")
    gamma: int = setting(5, "draft length of the replay", above(0))
    passages: int = setting(6, "held-out passages per context", above(0))
    new_tokens: int = setting(128, "tokens the target writes after each", above(0))


@dataclass(frozen=True)
class DistillRecipe:
    """A distil run: which models, and everything that they learn from and are measured on."""

    target: str = setting("pocket", "folder, GGUF file, hub name, or pocket")
    drafter: str | None = setting(
        "pocket", "the drafter to start from, named as the target; none takes the first layers of the target"
    )
    layers: int = setting(2, "how many layers of the target, where drafter is none", above(0))
    seed: int = setting(0, "seed of data order, views and sampling", SEED)
    device: str = setting("auto", "auto, cpu, cuda")
    precision: Literal["auto", "float32", "bfloat16"] = setting("auto", "auto: bf16 where its products are faster")
    temperature: float = setting(
        0.0, "serving temperature: what the target writes is written at it", TRAINED_TEMPERATURE
    )
    data: Data = field(default_factory=Data)
    views: Views = field(default_factory=Views)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def anchors(self) -> tuple[int, ...]:
        """Prompt lengths at which chunks are chosen of a training window."""
        last = self.data.context - self.views.anchor_tokens
        doubling = tuple(n for n in (1024 << i for i in range(12)) if n <= last)
        return self.views.anchors or doubling or (last,)

    def problems(self) -> Iterator[tuple[str, str]]:
        """(key, message) of values that do not fit together."""
        smallest = SINKS + GAMMA_MAX + 2
        d, v, e = self.data, self.views, self.evaluation
        if not d.sources:
            yield "data.sources", "must name at least one source"
        for key, budgets in (("views.budgets", v.budgets), ("evaluation.budgets", e.budgets)):
            numbers = [b for b in budgets if b != "full"]
            if not budgets:
                yield key, "must name at least one budget"
            if any(b < smallest for b in numbers):
                yield key, f"must be at least {smallest} each ({SINKS} sinks + {GAMMA_MAX} draft tokens + 2)"
        if v.mode != "full" and any(b >= d.context for b in v.budgets):
            yield "views.budgets", f"must lie below data.context ({d.context}), or the view is the full one"
        last = d.context - v.anchor_tokens
        if v.select != "window" and any(not 0 < anchor <= last for anchor in self.anchors()):
            yield "views.anchors", f"must lie between 1 and {last}, views.anchor_tokens before data.context"
        if v.select == "official" and v.positions == "rebased":
            yield "views.positions", "must be absolute: the paper's selection keeps true positions"
        if v.teach == "anchored" and v.select == "window":
            yield "views.teach", "must be all: window views have no anchors"
        if d.cache == "argmax" and self.loss.kind != "ce":
            yield "data.cache", f"must hold more than argmax for loss.kind {self.loss.kind}"
        if v.weights and (len(v.weights) != len(v.budgets) or min(v.weights) < 0 or sum(v.weights) <= 0):
            yield "views.weights", f"must be {len(v.budgets)} non-negative numbers, one for each of views.budgets"
        if not 0 < d.written_tokens < d.context:
            yield "data.written_tokens", f"must lie between 0 and data.context ({d.context})"
        if not e.contexts or min(e.contexts) < 32:
            yield "evaluation.contexts", "must be at least 32 tokens each"
