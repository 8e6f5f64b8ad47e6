"""What the schemas of training recipes share. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal


def setting(default, meaning: str):
    """A field with its meaning, for help texts and tests."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Updates:
    """How gradients become steps; the schemas add what they count steps in."""

    method: Literal["adamw", "muon"] = setting("adamw", "muon orthogonalises the updates of matrices inside layers")
    lr: float = setting(1e-3, "peak learning rate")
    vector_lr: float | None = setting(None, "with muon: AdamW's rate for embedding, head and norms; none is lr")
    weight_decay: float = setting(0.01, "decoupled weight decay, matrices only")
    clip: float = setting(1.0, "gradient norm above which gradients are scaled down")

    def problems(self) -> Iterator[tuple[str, str]]:
        for name in ("lr", "clip", "vector_lr"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                yield f"optimizer.{name}", "must be above 0"
        if self.weight_decay < 0:
            yield "optimizer.weight_decay", "must not be negative"
