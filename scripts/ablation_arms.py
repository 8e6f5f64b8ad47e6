"""The arms of the ablation: ways to train a drafter, and ways to read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from bdcli.config.distill import DistillRecipe, Loss, Views

PAPER_BUDGETS = {256: 0.4, 512: 0.3, 1024: 0.2, 2048: 0.1}  # and their probabilities
FIXED_BUDGET = 1024  # of the arm `fixed`
READINGS = {"window": ("window", "rebased"), "official": ("official", "absolute")}  # selection and positions in decode


@dataclass(frozen=True)
class Arm:
    """A way to train: what it makes of the recipe, None where nothing is trained; and how its drafter is read."""

    meaning: str
    change: Callable[[DistillRecipe], DistillRecipe] | None
    readings: tuple[str, ...] = ("window",)


def _below(recipe: DistillRecipe, *budgets: int) -> tuple[int, ...]:
    return tuple(b for b in budgets if b < recipe.data.context) or recipe.views.budgets


def _fixed(r: DistillRecipe) -> DistillRecipe:
    return replace(r, views=replace(r.views, mode="sampled", budgets=_below(r, FIXED_BUDGET)[:1], weights=()))


def _paper(r: DistillRecipe) -> DistillRecipe:
    """Its views, selection and loss; learning rate, steps and texts are those of all arms."""
    budgets, tokens = _below(r, *PAPER_BUDGETS), min(256, r.data.context // 4)
    views = Views(
        mode="sampled",
        budgets=budgets,
        weights=tuple(PAPER_BUDGETS.get(b, 1.0) for b in budgets),
        positions="absolute",
        select="official",
        anchors=(r.data.context - tokens,),
        anchor_tokens=tokens,
        teach="anchored",
    )
    return replace(r, views=views, loss=Loss(kind="ce", sparse_weight=0.5))


ARMS = {
    "none": Arm("no distillation", None),
    "full": Arm("full cache only", lambda r: replace(r, views=replace(r.views, mode="full"))),
    "fixed": Arm(f"one fixed budget ({FIXED_BUDGET})", _fixed),
    "paper": Arm("the paper's recipe", _paper, ("official", "window")),
    "one": Arm("one sampled view", lambda r: replace(r, views=replace(r.views, mode="sampled", weights=()))),
    "ours": Arm("ours", lambda r: r),
}
