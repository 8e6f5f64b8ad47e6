"""Whether a drafter was made for the positions that a run asks of it."""

from __future__ import annotations

from bdcli.cache.selection import Selection
from bdcli.model.config import ModelConfig


def positions_note(drafter: ModelConfig, selection: Selection, tokens: int) -> str | None:
    """A line where a text of `tokens`, new ones included, takes the drafter beyond what it was made for; else None.

    Rebased positions stay within the budget, whatever the text's length; a full cache and absolute positions do not.
    """
    rebased = selection.positions == "rebased"
    needed = min(tokens, selection.budget) if rebased else tokens
    limit = drafter.context_limit
    if needed <= limit:
        return None
    kept = "its full cache" if selection.budget is None else f"{selection.positions} positions"
    way_out = f"a budget of at most {limit}" + ("" if rebased else " with rebased positions")
    return f"the drafter was made for {limit} positions, {kept} may need {needed}: it drafts better with {way_out}"
