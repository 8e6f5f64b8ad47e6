"""What a distil recipe needs and this machine has not, or has from another recipe: found before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from bdcli.base.errors import UserError
from bdcli.base.files import digest, read_json
from bdcli.config.distill import DistillRecipe
from bdcli.data.identity import sources_identity
from bdcli.data.split import missing_texts
from bdcli.model.checkpoint import fingerprint, read_config
from bdcli.model.hub import resolve
from bdcli.model.tokenizer import check_vocabulary, load_tokenizer

MANIFEST, PASSAGES = "manifest.json", "passages.json"
START = "start"  # folder of a drafter made of the target's first layers


def missing_inputs(
    recipe: DistillRecipe, out: Path | None = None, data: Path | None = None
) -> Iterator[tuple[str, str]]:
    """(key, message) of models and texts that are not here or do not fit together, or to what `data` was made from.

    `out` is the folder of the run where there may be one, `data` what prepare made for it.
    """
    folders = {}
    for role in ("target", "drafter"):
        try:
            name = getattr(recipe, role)
            if name is not None:
                folders[role] = resolve(name, role)
                vocabulary = read_config(folders[role]).vocab_size
                if role == "target" and recipe.data.cache == "topk" and recipe.data.top_k > vocabulary:
                    yield "data.top_k", f"must be at most {vocabulary}, the vocabulary of the target"
            elif out is not None and (out / START).exists():  # an earlier start made it of the target
                folders[role] = out / START
        except UserError as error:
            folders.pop(role, None)
            yield role, str(error)
    if len(folders) == 2:
        try:
            check_vocabulary(*folders.values(), load_tokenizer(folders["target"]))
        except UserError as error:
            yield "drafter", str(error)
        if data is not None:
            try:
                yield from _made_for_another(recipe, data, *folders.values())
            except UserError as error:
                yield "data", str(error)
    yield from missing_texts("data", recipe.data.sources, "evaluation", recipe.evaluation.sources)


def window_dependencies(recipe: DistillRecipe, target: Path, drafter: Path) -> dict:
    """What prepared windows depend on, by the recipe's keys."""
    data = asdict(recipe.data)
    data.pop("together")  # changes how fast, not what
    return {
        "data": data,
        "data.sources": sources_identity(recipe.data.sources),
        "seed": recipe.seed,
        "temperature": recipe.temperature,
        "loss.temperature": recipe.loss.temperature if recipe.data.cache == "topk" else None,
        "target": fingerprint(target),
        "drafter": fingerprint(drafter),
    }


def passages_key(recipe: DistillRecipe, target: Path) -> str:
    """Key of what measured passages depend on."""
    evaluation = asdict(recipe.evaluation)
    for name in ("every", "patience"):
        evaluation.pop(name)
    sources = sources_identity(recipe.evaluation.sources or recipe.data.sources)
    return digest([evaluation, sources, recipe.temperature, fingerprint(target)])


def changed_parts(made: dict, parts: dict) -> list[str]:
    """Keys whose parts are others than those that something was `made` from, as JSON holds it."""
    return [name for name, part in json.loads(json.dumps(parts)).items() if made.get(name) != part]


def _made_for_another(recipe: DistillRecipe, data: Path, target: Path, drafter: Path) -> Iterator[tuple[str, str]]:
    hint = "Give another --out, or remove the folder to make it again"
    manifest = data / MANIFEST
    if manifest.exists():
        made = read_json(manifest)["parts"]
        for key in changed_parts(made, window_dependencies(recipe, target, drafter)):
            yield key, f"{manifest} was made for another {key}. {hint}"
    passages = data / PASSAGES
    if passages.exists() and read_json(passages)["key"] != passages_key(recipe, target):
        yield "evaluation", f"{passages} was made for another evaluation, target or temperature. {hint}"
