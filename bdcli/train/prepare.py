"""What a distil run learns from and is measured on: training windows, and passages that the target wrote.

Both are made once, kept in the run's folder under a key of everything they depend on, and go on where they stopped.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from bdcli.checkpoint import fingerprint
from bdcli.controller import FixedGamma
from bdcli.decode import Pair, make_speculator
from bdcli.metrics import looped_tokens
from bdcli.options import DecodeOptions
from bdcli.train.acceptance import Passage
from bdcli.train.data import held_out_prompts, training_windows
from bdcli.train.distill_recipe import DistillRecipe
from bdcli.train.files import digest, read_state, write_state, write_text

WRITING_BUDGET, WRITING_GAMMA = 512, 4  # how the undistilled drafter helps the target write


class Material:
    """Windows and passages of one recipe, made with `pair` (loaded from `folders`) and kept in `out`."""

    def __init__(
        self,
        recipe: DistillRecipe,
        out: Path,
        pair: Pair,
        folders: tuple[Path, Path],
        progress: Callable[[str, int, int, str], None],
    ):
        self._recipe, self._out, self._pair, self._folders, self._progress = recipe, out, pair, folders, progress

    def windows(self) -> tuple[Tensor, dict[str, int]]:
        """Training windows [n, T] int32 and how many written ends were dropped, by reason; made once."""
        path = self._out / "windows.pt"
        d = self._recipe.data
        key = digest(asdict(d), self._recipe.seed, self._recipe.temperature, *map(fingerprint, self._folders))
        saved = read_state(path, key) if path.exists() else None
        if saved is None:
            rows = training_windows(self._pair.tokenizer, d.sources, d.context, d.windows, self._recipe.seed)
            saved = {"rows": torch.tensor(rows, dtype=torch.int32), "done": 0, "loops": 0, "short": 0}
        rng = random.Random(self._recipe.seed)
        warmth = self._recipe.temperature if d.written_temperature is None else d.written_temperature
        chosen = sorted(rng.sample(range(d.windows), round(d.written * d.windows)))
        while saved["done"] < len(chosen):
            row = saved["rows"][chosen[saved["done"]]]
            prompt = row[: -d.written_tokens].tolist()
            text = self._write(prompt, d.written_tokens, warmth, seed=chosen[saved["done"]])
            if len(text) < d.written_tokens:
                saved["short"] += 1
            elif sum(looped_tokens(prompt, text)) > d.max_loop_rate * len(text):
                saved["loops"] += 1
            else:
                row[-d.written_tokens :] = torch.tensor(text, dtype=torch.int32)
            saved["done"] += 1
            self._progress("the target writes", saved["done"], len(chosen), f"{saved['loops']} looped")
            if saved["done"] % 8 == 0 or saved["done"] == len(chosen):
                write_state(path, key, saved)
        if not path.exists():
            write_state(path, key, saved)
        return saved["rows"], {
            "read": d.windows,
            "written": len(chosen),
            "loops": saved["loops"],
            "short": saved["short"],
        }

    def passages(self) -> list[Passage]:
        """Held-out prompts, all contexts of one ending at the same token, and what the target writes; made once."""
        path, e = self._out / "passages.json", self._recipe.evaluation
        key = digest(asdict(e), self._recipe.data.sources, self._recipe.temperature, fingerprint(self._folders[0]))
        if path.exists():
            saved = json.loads(path.read_text("utf-8"))
            if saved["key"] == key:
                return [
                    Passage(p["dataset"], tuple(p["prompt"]), tuple(p["text"]), p["limit"]) for p in saved["passages"]
                ]
        longest = max(e.contexts)
        prompts = held_out_prompts(self._pair.tokenizer, self._recipe.data.sources, longest, e.passages)
        found, total = [], len(prompts) * len(e.contexts)
        for n, (dataset, ids) in enumerate(prompts):
            for context in e.contexts:
                text = self._write(ids[longest - context :], e.new_tokens, self._recipe.temperature, seed=n)
                found.append(Passage(dataset, tuple(ids[longest - context :]), tuple(text), e.new_tokens))
                self._progress("held-out passages", len(found), total, "")
        write_text(path, json.dumps({"key": key, "passages": [asdict(p) for p in found]}))
        return found

    def _write(self, prompt: list[int], tokens: int, temperature: float, seed: int) -> list[int]:
        """What the target writes after `prompt`, sped up by the undistilled drafter."""
        options = DecodeOptions(
            budget=WRITING_BUDGET,
            gamma=WRITING_GAMMA,
            temperature=temperature,
            seed=seed,
            max_new_tokens=tokens,
            device="cpu",
        )
        engine = make_speculator(self._pair, options, len(prompt))
        engine.prefill(prompt)
        for _ in engine.rounds(tokens, self._pair.eos, FixedGamma(WRITING_GAMMA)):
            pass
        return engine.new_tokens
