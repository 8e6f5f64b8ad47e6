"""How a model is meant to be sampled: its generation_config.json, as far as it concerns sampling. No torch here."""

from __future__ import annotations

from pathlib import Path

from bdcli.base.errors import UserError
from bdcli.model.hub import read_model_json

NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def sampling_settings(folder: Path) -> dict[str, float]:
    """Settings that the model's file names, by the names of decode's options; temperature 0 where it does not sample.

    A file that neither says `do_sample` nor gives a temperature, top_k, top_p or min_p is greedy, as `transformers` is.
    Raises UserError where there is no file, or a value is no number.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        raise UserError(f"--generation-config: {folder} holds no generation_config.json", "Give the settings as flags")
    given = read_model_json(path)
    found = {name: given[name] for name in NEUTRAL if given.get(name) is not None}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{path}: {name} is {value!r}, not a number", "Correct it, or give the settings as flags")
    samples = given.get("do_sample")
    if samples is None:
        samples = any(name != "repetition_penalty" for name in found)
    if not samples:
        return {name: value for name, value in found.items() if name == "repetition_penalty"} | {"temperature": 0.0}
    return {"temperature": NEUTRAL["temperature"]} | found
