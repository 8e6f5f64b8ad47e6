"""What a sweep will hold: the most demanding of its arms, beside the weights of every model that its arms load."""

from __future__ import annotations

from dataclasses import replace

from bdcli.base.devices import dtype_name, pick_device, pick_dtype
from bdcli.base.progress import SILENT, Progress
from bdcli.cache.selection import CacheSize, parse_selection
from bdcli.config.bench import ENGINE_METHODS, TRANSFORMERS_METHODS, BenchRecipe
from bdcli.config.decode import BITS, OWN, SELECTIONS
from bdcli.decode.memory import DecodePlan, check_plan, decode_plan, runtime_bytes
from bdcli.model.checkpoint import read_config
from bdcli.model.hub import resolve
from bdcli.model.sizes import draft_weight_bytes, weight_bytes


def sweep_plan(recipe: BenchRecipe) -> DecodePlan:
    """Plan of the longest context, from configurations alone. Raises UserError where a model is not here."""
    device = pick_device(recipe.device)
    kind = dtype_name(pick_dtype(recipe.dtype, device, recipe.engine))
    target = read_config(resolve(recipe.target, "target"))
    names = {recipe.drafter, *filter(None, map(recipe.drafter_of, recipe.arms.values()))}
    drafters = {name: target if name == OWN else read_config(resolve(name, "drafter")) for name in names}
    context, plans = max(recipe.contexts), []
    for arm in recipe.arms.values():
        if arm.method not in ENGINE_METHODS:
            continue
        budget = arm.budget if isinstance(arm.budget, int) else None
        select = arm.method if arm.method in SELECTIONS else arm.select
        selection = parse_selection(budget, select, arm.positions, None if arm.gamma == "auto" else arm.gamma)
        total = context + recipe.max_new_tokens
        size = CacheSize(context - 1, total + selection.gamma_max + 2, total)
        drafter = drafters.get(recipe.drafter_of(arm))
        plans.append(decode_plan(target, drafter, kind, size, selection, runtime_bytes(device)))
    lighter = "int4" if recipe.draft_weights == "auto" else recipe.draft_weights
    weights = weight_bytes(target, recipe.weights, kind)
    for name, config in drafters.items():
        if name != OWN:
            weights += weight_bytes(config, recipe.draft_weights, kind)
        elif lighter in BITS and device.type == "cpu" and recipe.engine != "torch":
            weights += draft_weight_bytes(config, lighter)
    plain = sum(weight_bytes(config, kind) for config in (target, *drafters.values()))
    # copies of transformers' own
    copies = len({arm.dtype for arm in recipe.arms.values() if arm.method in TRANSFORMERS_METHODS})
    return replace(max(plans, key=lambda plan: plan.peak), weights=weights + copies * plain)


def check_sweep(recipe: BenchRecipe, progress: Progress = SILENT) -> None:
    """Raises UserError where a sweep does not fit into memory, before anything is loaded.

    What another library's model will hold is not known.
    """
    if recipe.engine == "transformers":
        return
    check_plan(sweep_plan(recipe), pick_device(recipe.device), progress)
