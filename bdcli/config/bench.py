"""The schema of a bench recipe: contexts × data sets × named arms, with every default and meaning. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from bdcli.cache.view import GAMMA_MAX, SINKS
from bdcli.config.decode import WEIGHTS, default_drafter
from bdcli.config.settings import SAMPLING_BOUNDS, SEED, at_least, setting

ENGINE_METHODS = ("ar", "bd", "full", "window", "chunk", "official", "lookup")
PEER_METHODS = ("hf-ar", "hf-static", "hf-assisted", "hf-lookup")
BUDGETED = ("bd", "window", "chunk", "official")  # methods whose drafter has a KV budget
DRAFTING = ("bd", "full", "window", "chunk", "official", "lookup", "hf-assisted", "hf-lookup")
NAIVE = "naive"


@dataclass(frozen=True)
class Arm:
    """One way to draft that is measured."""

    method: Literal[ENGINE_METHODS + PEER_METHODS] = setting(
        "bd",
        "ar; bd: the drafter under a budget; full: with its full cache; window, chunk: the undistilled drafter read "
        "sparsely; official: the paper's selection; lookup: n-grams of the text; hf-ar, hf-static, hf-assisted, "
        "hf-lookup: the same weights in transformers",
    )
    budget: int | Literal["full"] | None = setting(None, "KV entries of the drafter; bd also takes full")
    gamma: int | Literal["auto"] = setting("auto", "tokens drafted per round")
    select: Literal["window", "chunk"] = setting("window", "what a bd drafter keeps of the prompt")
    positions: Literal["rebased", "absolute"] = setting("rebased", "places of kept keys")
    drafter: str | None = setting(None, "another drafter: folder, GGUF file, hub name, pocket, or naive")
    contexts: tuple[int, ...] = setting((), "only at these contexts; empty is all")
    dtype: Literal["float32", "bfloat16", "float16"] | None = setting(None, "of a peer (hf-) alone, not the recipe's")


@dataclass(frozen=True)
class BenchRecipe:
    """A sweep: the models, the texts, and the arms that are compared on them."""

    target: str = setting("pocket", "folder, GGUF file, hub name, or pocket")
    drafter: str | None = setting(
        None, "the drafter that is measured, named as the target, or self (the default for a target you name)"
    )
    weights: Literal[WEIGHTS] = setting("auto", "of the target; int8 and int4 change what the target is")
    draft_weights: Literal[WEIGHTS] = setting("auto", "of the drafters; auto: int4 for self, else as stored")
    naive: str | None = setting(None, "an undistilled drafter, for the arms window and chunk and `drafter: naive`")
    datasets: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: {"stdlib": ("stdlib",)},
        metadata={"help": "name: stdlib, text files, a folder, .jsonl, .parquet or a hub data set"},
    )
    contexts: tuple[int, ...] = setting((4096,), "prompt tokens; all contexts of a sample end at the same token")
    samples: int = setting(4, "prompts of each data set", at_least(1))
    max_new_tokens: int = setting(128, "tokens written after each", at_least(1))
    warmup_samples: int = setting(0, "first prompts that are run but not counted")
    protocol: Literal["default", "paper"] = setting("default", "paper: show the published figures beside ours")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting("auto", "auto: bf16 where it is native")
    device: str = setting("auto", "auto, cpu, cuda, ...")
    engine: Literal["auto", "compiled", "torch"] = setting("auto", "what runs the forwards of our arms")
    temperature: float = setting(0.0, "0 is greedy", SAMPLING_BOUNDS["temperature"])
    top_k: int = setting(0, "0 is off", SAMPLING_BOUNDS["top_k"])
    top_p: float = setting(1.0, "1 is off", SAMPLING_BOUNDS["top_p"])
    min_p: float = setting(0.0, "0 is off", SAMPLING_BOUNDS["min_p"])
    repetition_penalty: float = setting(1.0, "1 is off", SAMPLING_BOUNDS["repetition_penalty"])
    seed: int = setting(0, "seed of sampling", SEED)
    special_tokens: Literal["parse", "text"] = setting("parse", "special tokens that texts spell: tokens, or text")
    arms: dict[str, Arm] = field(
        default_factory=lambda: {"bd-512": Arm(budget=512)},
        metadata={"help": "name: method, budget, gamma, ...; ar is always among them"},
    )

    def __post_init__(self):
        if self.drafter is None:
            object.__setattr__(self, "drafter", default_drafter(self.target))
        if not any(arm is not None and arm.method == "ar" for arm in self.arms.values()):
            object.__setattr__(self, "arms", {"ar": Arm("ar"), **self.arms})

    def arms_at(self, context: int) -> dict[str, Arm]:
        """The arms that are measured at a context, in order."""
        return {name: arm for name, arm in self.arms.items() if not arm.contexts or context in arm.contexts}

    def drafter_of(self, arm: Arm) -> str | None:
        """Name of the drafter that an arm uses; None where it has none."""
        if arm.method not in DRAFTING or arm.method in ("lookup", "hf-lookup"):
            return None
        name = arm.drafter or (NAIVE if arm.method in ("window", "chunk") else self.drafter)
        return self.naive if name == NAIVE else name

    def problems(self) -> Iterator[tuple[str, str]]:
        """(key, message) of values that do not fit together."""
        if not 0 <= self.warmup_samples < max(self.samples, 1):
            yield "warmup_samples", f"must lie in 0 .. samples - 1 ({self.samples - 1})"
        if not self.contexts or min(self.contexts) < 2:
            yield "contexts", "must be at least 2 tokens each"
        if not self.datasets:
            yield "datasets", "must name at least one"
        for name, sources in self.datasets.items():
            if not sources:
                yield f"datasets.{name}", "must name at least one source"
        if sum(arm.method == "ar" for arm in self.arms.values()) > 1:
            yield "arms", "ar may stand there once"
        for name, arm in self.arms.items():
            yield from self._arm_problems(f"arms.{name}", arm)

    def _arm_problems(self, key: str, arm: Arm) -> Iterator[tuple[str, str]]:
        least = SINKS + GAMMA_MAX + 2
        if arm.method in BUDGETED and arm.budget is None:
            yield f"{key}.budget", f"{arm.method} needs a budget"
        if arm.method not in (*BUDGETED, "full") and arm.budget is not None:
            yield f"{key}.budget", f"{arm.method} has no budget"
        if arm.budget == "full" and arm.method not in ("bd", "full"):
            yield f"{key}.budget", f"{arm.method} needs a number; the full cache is the method full"
        if isinstance(arm.budget, int) and (arm.budget < least or arm.method == "full"):
            yield f"{key}.budget", f"must be at least {least}" if arm.method != "full" else "full has no bound"
        if arm.dtype is not None and arm.method not in PEER_METHODS:
            yield f"{key}.dtype", f"{arm.method} runs in the dtype of the recipe, beside its baseline"
        if arm.contexts and arm.method == "ar":
            yield f"{key}.contexts", "ar is measured at all contexts"
        if arm.gamma != "auto" and arm.gamma < 1:
            yield f"{key}.gamma", "must be at least 1, or auto"
        if arm.method != "ar" and self.drafter_of(arm) is None and arm.method in ("window", "chunk"):
            yield key, f"{arm.method} reads an undistilled drafter: name it under naive (--naive DIR)"
        if arm.drafter == NAIVE and self.naive is None and arm.method not in ("window", "chunk"):
            yield key, "drafter is naive, but naive names none (--naive DIR)"


def crossed_arms(methods: list[str], budgets: list[int | str], gammas: list[int | str], **common) -> dict[str, Arm]:
    """Every method with every budget and γ that applies to it, named like bd-512-g5."""
    arms: dict[str, Arm] = {}
    for method in methods:
        for budget in [b for b in budgets if b != "full" or method == "bd"] if method in BUDGETED else [None]:
            for gamma in gammas if method in DRAFTING else ["auto"]:
                parts = [method, budget, f"g{gamma}" if gamma != "auto" else None]
                name = "-".join(str(part) for part in parts if part is not None)
                arms[name] = Arm(method, budget, gamma, **common)
    return arms
