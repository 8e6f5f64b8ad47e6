"""Defaults and meanings of the decode options, in one place, without torch. Raises UserError on bad values."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from bdcli.base.errors import UserError
from bdcli.cache.selection import SELECTIONS
from bdcli.config.settings import LARGEST_COUNT, SAMPLING_BOUNDS

OWN = "self"  # as a drafter's name: the target itself
WEIGHTS = ("auto", "bf16", "int8", "int4")
BITS = {"int8": 8, "int4": 4}  # of quantised weights
CHOICES = {
    "select": SELECTIONS,
    "positions": ("rebased", "absolute"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "weights": WEIGHTS,
    "draft_weights": WEIGHTS,
    "engine": ("auto", "triton", "compiled", "torch", "transformers"),
    "baseline": ("sample", "full", "off"),
    "trim": ("middle",),
    "special_tokens": ("parse", "text"),
}


@dataclass(frozen=True)
class DecodeOptions:
    """Settings of one decode run. budget None is a full cache, gamma None is auto.

    drafter None becomes pocket for the pocket target, else self: the target as its own drafter.
    """

    target: str = "pocket"
    drafter: str | None = None
    budget: int | None = 512
    gamma: int | None = None
    select: str = "window"
    positions: str = "rebased"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 256
    weights: str = "auto"
    draft_weights: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    engine: str = "auto"
    baseline: str = "sample"
    check: bool = False
    trim: str | None = None
    chat: bool = False
    special_tokens: str = "parse"
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        if self.drafter is None:
            object.__setattr__(self, "drafter", default_drafter(self.target))
        for name, values in CHOICES.items():
            value = getattr(self, name)
            if value not in values and not (name == "trim" and value is None):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} {value} is not one of {', '.join(values)}", f"Default: {_default(name)}")
        _require(self.gamma is None or self.gamma >= 1, f"--gamma {self.gamma}", "be at least 1, or auto")
        _require(self.budget is None or self.budget >= 1, f"--budget {self.budget}", "be at least 1, or full")
        whole = 1 <= self.max_new_tokens <= LARGEST_COUNT
        _require(whole, f"--max-new-tokens {self.max_new_tokens}", f"lie in 1 .. {LARGEST_COUNT}")
        for name, bounds in SAMPLING_BOUNDS.items():
            value = getattr(self, name)
            _require(bounds.allows(value), f"--{name.replace('_', '-')} {value}", bounds.rule.removeprefix("must "))
        if self.check and self.temperature > 0:
            raise UserError(
                f"--check compares greedy text, and --temperature {self.temperature} samples",
                "Leave --check out, or give --temperature 0",
            )
        _require(all(self.stop), "--stop ''", "hold at least one character")

    def as_dict(self) -> dict:
        return asdict(self) | {"budget": self.budget or "full", "gamma": self.gamma or "auto"}


def default_drafter(target: str) -> str:
    """The drafter of a target for which none is named."""
    return "pocket" if target == "pocket" else OWN


def _default(name: str) -> object:
    return DecodeOptions.__dataclass_fields__[name].default


def _require(good: bool, what: str, must: str) -> None:
    if not good:
        raise UserError(f"{what}: must {must}")


def parse_budget(text: str) -> int | None:
    """`512` or `full` (None)."""
    return None if text == "full" else _whole(text, "--budget", "a number of KV entries, or full")


def parse_gamma(text: str) -> int | None:
    """`5` or `auto` (None)."""
    return None if text == "auto" else _whole(text, "--gamma", "a draft length, or auto")


def parse_context(text: str) -> int:
    """`4k` = 4096, `8192` = 8192."""
    match = re.fullmatch(r"(\d+)(k?)", text.strip().lower())
    if not match or int(match[1]) == 0:
        raise UserError(f"--ctx {text} is not a context length", "Give tokens like 4096, or 4k")
    return int(match[1]) * (1024 if match[2] else 1)


def _whole(text: str, flag: str, meaning: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{flag} {text}: must be {meaning}") from None
