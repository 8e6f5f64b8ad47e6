"""How gradients become steps: settings that the schemas of training recipes share. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bdcli.config.settings import NON_NEGATIVE, above, at_least, setting


@dataclass(frozen=True)
class Updates:
    """The schemas add what they count steps in."""

    method: Literal["adamw", "muon"] = setting("adamw", "muon orthogonalises the updates of matrices inside layers")
    lr: float = setting(1e-3, "peak learning rate", above(0))
    vector_lr: float | None = setting(
        None, "with muon: AdamW's rate for embedding, head and norms; none is lr", above(0)
    )
    weight_decay: float = setting(0.01, "decoupled weight decay, matrices only", at_least(0, NON_NEGATIVE))
    clip: float = setting(1.0, "gradient norm above which gradients are scaled down", above(0))
