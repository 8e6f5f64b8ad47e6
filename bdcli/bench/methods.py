"""Ways to continue a prompt, one small class each, in one table. To measure another tool, add a class to it.

A method is made once for an arm and runs on every prompt: `prepare` reads the prompt where the method has a cache of
its own, `generate` generates. The methods of our engine share the target's cache and differ only in their drafter.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from bdcli.base.devices import pick_dtype
from bdcli.base.progress import SILENT, Progress
from bdcli.bench import llama_cpp, peers, runtimes
from bdcli.bench.lookup import Lookup
from bdcli.bench.outcome import Method, Outcome, PreparedTarget
from bdcli.config.bench import Arm, BenchRecipe
from bdcli.config.decode import SELECTIONS, DecodeOptions
from bdcli.decode.pair import Pair, load_pair, with_drafter
from bdcli.decode.session import Session
from bdcli.results.metrics import RoundFigures
from bdcli.speculation.baseline import warm_up
from bdcli.speculation.drafter import Drafter
from bdcli.speculation.speculator import Speculator


@dataclass
class Models:
    """Every model that the arms of a recipe need, each loaded once, when first asked for."""

    recipe: BenchRecipe
    progress: Progress = SILENT
    _pairs: dict[str | None, Pair] = field(default_factory=dict)
    _transformers: dict[torch.dtype, peers.Transformers] = field(default_factory=dict)

    @cached_property
    def pair(self) -> Pair:
        """The target and the measured drafter."""
        r = self.recipe
        names = ("target", "drafter", "weights", "draft_weights", "dtype", "device", "engine")
        return load_pair(DecodeOptions(**{name: getattr(r, name) for name in names}), self.progress)

    def with_drafter(self, name: str | None) -> Pair:
        """The target with the drafter `name`; None means that none is used."""
        if name is None or name == self.recipe.drafter:
            return self.pair
        if name not in self._pairs:
            self._pairs[name] = with_drafter(self.pair, name, self.recipe.draft_weights, self.progress)
        return self._pairs[name]

    def transformers(self, arm: Arm) -> peers.Transformers:
        """The same weights as `transformers` models, shared by the arms of one dtype."""
        like = self.pair.target
        dtype = pick_dtype(arm.dtype, like.device) if arm.dtype else like.dtype
        if dtype not in self._transformers:
            self._transformers[dtype] = peers.Transformers(self.recipe, like.device, dtype, self.pair.eos)
        return self._transformers[dtype]


class EngineMethod(Method):
    """Decoding in our engine with the drafter and selection of the arm."""

    def __init__(self, models: Models, arm: Arm):
        self.arm, r = arm, models.recipe
        options = DecodeOptions(
            target=r.target,
            drafter=r.drafter_of(arm) or r.drafter,
            budget=arm.budget if isinstance(arm.budget, int) else None,
            gamma=None if arm.gamma == "auto" else arm.gamma,
            select=arm.method if arm.method in SELECTIONS else arm.select,
            positions=arm.positions,
            temperature=r.temperature,
            top_k=r.top_k,
            top_p=r.top_p,
            min_p=r.min_p,
            repetition_penalty=r.repetition_penalty,
            seed=r.seed,
            max_new_tokens=r.max_new_tokens,
            baseline="off",
        )
        self.session = Session(models.with_drafter(r.drafter_of(arm)), options)
        self.session.selection.view(0)  # too small a budget is refused before anything is measured
        self.gamma_max = self.session.selection.gamma_max

    def drafter(self, prompt: int) -> Drafter | None:
        """An empty drafter for a prompt of `prompt` tokens."""
        return self.session.drafter(prompt)

    def columns(self) -> dict:
        selection = self.session.selection
        return {"select": selection.label, "positions": selection.positions}

    def generate(self, prompt: list[int], prepared: PreparedTarget, seed: int) -> Outcome:
        target, o = prepared.target, self.session.options
        drafter = self.drafter(len(prompt))
        run = Speculator(target, drafter, self.session.sampling, seed, target.model.device)
        target.rollback(len(prompt) - 1)
        started = time.perf_counter()
        run.prefill(prompt, target_ready=True)
        prefill_s = time.perf_counter() - started
        controller = warm_up(run, self.session.gamma if drafter is not None else 0, self.gamma_max)
        rounds = [RoundFigures.of(r) for r in run.rounds(o.max_new_tokens, self.session.pair.eos, controller)]
        return Outcome(
            tokens=run.new_tokens,
            rounds=rounds,
            ttft_s=prepared.prefill_s + prefill_s + rounds[0].seconds,
            finish_reason=run.finish_reason,
            entries=drafter.peak_entries if drafter is not None else None,
            drafter_kv_bytes=drafter.kv_bytes if drafter is not None else 0,
            target_kv_bytes=target.cache.kv_bytes,
            weight_bytes=self._weight_bytes(drafter),
        )

    def _weight_bytes(self, drafter: Drafter | None) -> int:
        pair = self.session.pair
        return pair.target.weight_bytes if drafter is None or drafter.runner is None else pair.weight_bytes


class Autoregressive(EngineMethod):
    """No drafter: the baseline of every speedup."""

    def drafter(self, prompt: int) -> None:  # noqa: ARG002
        return None

    def columns(self) -> dict:
        return {}


class PromptLookup(EngineMethod):
    """Drafts are looked up in the prompt and the text generated so far."""

    def drafter(self, prompt: int) -> Lookup:  # noqa: ARG002
        return Lookup()

    def columns(self) -> dict:
        return {}


METHODS: dict[str, type[Method]] = {
    "ar": Autoregressive,
    "bd": EngineMethod,
    "full": EngineMethod,
    "window": EngineMethod,
    "chunk": EngineMethod,
    "official": EngineMethod,
    "lookup": PromptLookup,
    "hf-ar": peers.HfAutoregressive,
    "hf-static": peers.HfStatic,
    "hf-assisted": peers.HfAssisted,
    "hf-lookup": peers.HfLookup,
    "llama-cpp": llama_cpp.LlamaCpp,
    "llama-cpp-ngram": llama_cpp.LlamaCppNgram,
    "vllm": runtimes.Vllm,
    "openvino": runtimes.OpenVino,
    "openvino-sdpa": runtimes.OpenVinoSdpa,
    "openvino-int8": runtimes.OpenVinoInt8,
    "openvino-int4": runtimes.OpenVinoInt4,
}


def present(recipe: BenchRecipe) -> tuple[BenchRecipe, list[str]]:
    """The recipe without the arms whose tools are not here, and a line about each of their methods."""
    methods = dict.fromkeys(arm.method for arm in recipe.arms.values())
    absent = {method: why for method in methods if (why := METHODS[method].obstacle(recipe)) is not None}
    arms = {name: arm for name, arm in recipe.arms.items() if arm.method not in absent}
    return replace(recipe, arms=arms), [f"{method} is left out: {why}" for method, why in absent.items()]


def tool_versions(recipe: BenchRecipe) -> dict[str, str]:
    """Versions of the tools that the arms run besides our own packages."""
    return {name: v for arm in recipe.arms.values() for name, v in METHODS[arm.method].versions().items()}
