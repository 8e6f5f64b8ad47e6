"""What a distil run learns from and is measured on: shards of training windows, and passages that the target wrote.

documents -> candidate windows -> some with an end written by the target -> filter -> shards, with the target's answers
held-out documents -> prompts of every context -> what the target writes after each

Everything is made once under a key of all it depends on. A shard appears whole or not at all and is then listed in
the manifest; a stopped run continues at the first shard that is missing, and ends with the same files and accounts. A
shard holds columns of equal length; `datasets.Dataset.from_dict(safetensors.numpy.load_file(shard))` is a table of it.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bdcli.base.errors import UserError
from bdcli.base.files import digest, read_json, write_file
from bdcli.base.progress import SILENT, Progress
from bdcli.config.distill import DistillRecipe
from bdcli.data.sources import TOKEN_CHARACTERS
from bdcli.data.split import Candidate, TrainingDocuments, held_out_prompts
from bdcli.decode.pair import Pair
from bdcli.results.metrics import looped_tokens
from bdcli.speculation.sampling import Sampling, non_finite
from bdcli.train.acceptance import Passage, text_probs
from bdcli.train.distill.checks import MANIFEST, PASSAGES, changed_parts, passages_key, window_dependencies
from bdcli.train.distill.teacher import answers_to_store
from bdcli.train.distill.windows import Accounts, Windows
from bdcli.train.distill.writer import Writer

Numbered = tuple[int, Candidate]  # a candidate and its number among those of the documents


class Sample(NamedTuple):
    """What became of a candidate: its fate as `Accounts` counts it, and the columns of its window where it was kept.

    loop_rate: of the text that the target wrote for it, dropped or not; None where it wrote none.
    """

    number: int
    fate: str
    loop_rate: float | None
    columns: dict[str, Tensor] | None


class Material:
    """Windows and passages of one recipe, made with `pair` (loaded from `folders`) and kept in the folder `out`.

    After `deadline` (of `time.monotonic`) the target writes no more: passages are those that exist, windows keep the
    text of the corpus, and the manifest counts them as `late`.
    """

    def __init__(
        self,
        recipe: DistillRecipe,
        out: Path,
        pair: Pair,
        folders: tuple[Path, Path],
        progress: Progress = SILENT,
        deadline: float = math.inf,
    ):
        self._recipe, self._out, self._pair, self._progress = recipe, out, pair, progress
        self._deadline = deadline
        self._writer = Writer(pair, recipe.data.together)
        self._parts = window_dependencies(recipe, *folders) | {"dtype": str(pair.target.dtype)}
        self._passages_key = passages_key(recipe, folders[0])

    # -- windows

    def windows(self) -> Windows:
        """All shards, made where they are missing. Raises UserError on a damaged shard or another key."""
        self._out.mkdir(parents=True, exist_ok=True)
        manifest = self._manifest()
        d = self._recipe.data
        if not manifest["complete"]:
            documents = TrainingDocuments(d.sources, TOKEN_CHARACTERS * d.windows * d.context)
            documents.unread.note(self._progress)
            manifest["documents"] = asdict(Accounts(*documents.accounts))
            manifest["unread"] = asdict(documents.unread)
            self._make_shards(manifest, documents)
        return Windows(self._out, manifest, self._pair.target.head, self._recipe.loss.temperature)

    def _manifest(self) -> dict:
        path = self._out / MANIFEST
        if not path.exists():
            return {"parts": self._parts, "complete": False, "documents": None, "shards": []}
        manifest = read_json(path)
        other = changed_parts(manifest["parts"], self._parts)
        if other:
            raise UserError(
                f"{path} was made for another {other[0]}", "Use the recipe it was made by, or another --out"
            )
        for shard in manifest["shards"]:
            _check_shard(self._out / shard["file"], shard["sha256"])
        return manifest

    def _make_shards(self, manifest: dict, documents: TrainingDocuments) -> None:
        """Shards from the first missing one on, each followed by a new manifest."""
        d, shards = self._recipe.data, manifest["shards"]
        answer = d.written_tokens if d.written else 0
        candidates = documents.windows(self._pair.tokenizer, d.context, self._recipe.seed, answer)
        first = shards[-1]["next"] if shards else 0  # earlier shards were made of the candidates before
        numbered = islice(enumerate(candidates), first, None)
        made, wanted = sum(shard["accounts"]["kept"] for shard in shards), 0
        while made < d.windows:
            wanted = min(d.shard_windows, d.windows - made)
            samples = self._take_samples(numbered, wanted, made)
            kept = [sample.columns for sample in samples if sample.columns is not None]
            if kept:
                shards.append(self._write_shard(f"windows-{len(shards):05}.safetensors", kept, samples))
                made += len(kept)
                write_file(self._out / MANIFEST, _dump(manifest))
            if len(kept) < wanted:
                raise UserError(
                    f"{', '.join(d.sources)} holds {made} windows of {d.context} tokens, not {d.windows}",
                    "Lower data.windows or add sources",
                )
        manifest["complete"] = True
        write_file(self._out / MANIFEST, _dump(manifest))

    def _write_shard(self, name: str, kept: list[dict[str, Tensor]], samples: Sequence[Sample]) -> dict:
        """Write a shard of the windows `kept` of `samples`, atomically; returns its entry in the manifest."""
        from safetensors.torch import save

        body = save({column: torch.stack([row[column] for row in kept]) for column in kept[0]}, {"format": "pt"})
        write_file(self._out / name, body)
        accounts = Accounts.empty()
        for sample in samples:
            accounts.count(sample.fate)
        return {
            "file": name,
            "sha256": digest(body),
            "next": samples[-1].number + 1,
            "late": sum(int(row["late"]) for row in kept),
            "accounts": asdict(accounts),
            "loop_rates": {s.number: s.loop_rate for s in samples if s.loop_rate is not None},
        }

    def _take_samples(self, candidates: Iterator[Numbered], wanted: int, made: int) -> list[Sample]:
        """What became of the next candidates until `wanted` were kept or none is left; `made` windows exist before."""
        samples: list[Sample] = []
        kept = 0
        while kept < wanted:
            group = list(islice(candidates, min(self._writer.together, wanted - kept)))
            if not group:
                break
            samples += self._decide(group)
            kept = sum(sample.columns is not None for sample in samples)
            dropped = sum(sample.fate not in ("kept", "failed") for sample in samples)
            self._progress.advance("windows", made + kept, self._recipe.data.windows, f"{dropped} dropped")
        return samples

    def _decide(self, group: Sequence[Numbered]) -> Iterator[Sample]:
        """Samples of candidates, after the target has written the ends of some."""
        d = self._recipe.data
        late = time.monotonic() > self._deadline
        chosen = {number for number, candidate in group if self._is_chosen(number, candidate)}
        prompts = {n: c.ids if c.question else c.ids[: -d.written_tokens] for n, c in group if n in chosen and not late}
        texts = self._write_ends(prompts)
        for number, candidate in group:
            if number in texts:
                yield self._sample_of_text(number, prompts[number], texts[number])
            elif candidate.question:  # the corpus continues a text, but does not answer a question
                yield Sample(number, "late", None, None)
            else:
                yield Sample(number, "kept", None, self._columns(candidate.ids, None, late=number in chosen))

    def _is_chosen(self, number: int, candidate: Candidate) -> bool:
        """Whether the target is to write the end of a candidate; a function of the seed and its number."""
        share = random.Random(f"{self._recipe.seed}/{number}").random()
        return candidate.question or share < self._recipe.data.written

    def _write_ends(self, prompts: dict[int, list[int]]) -> dict[int, list[int] | None]:
        """What the target writes after each numbered prompt, whose number is its seed."""
        r, d = self._recipe, self._recipe.data
        temperature = r.temperature if d.written_temperature is None else d.written_temperature
        texts = self._writer.write(list(prompts.values()), d.written_tokens, temperature, seeds=list(prompts))
        return dict(zip(prompts, texts, strict=True))

    def _sample_of_text(self, number: int, prompt: list[int], text: list[int] | None) -> Sample:
        """A window whose end is `text`, dropped where that is too short or loops."""
        d = self._recipe.data
        loop_rate = sum(looped_tokens(prompt, text)) / len(text) if text else None
        if text is None:
            return Sample(number, "failed", None, None)
        if len(text) < d.written_tokens:
            return Sample(number, "ended early", loop_rate, None)
        if loop_rate > d.max_loop_rate:
            return Sample(number, "loops", loop_rate, None)
        return Sample(number, "kept", loop_rate, self._columns(prompt + text, loop_rate, late=False))

    def _columns(self, ids: list[int], loop_rate: float | None, late: bool) -> dict[str, Tensor]:
        """A row of a shard; `loop_rate` None where the target wrote none of it."""
        row = {
            "ids": torch.tensor(ids, dtype=torch.int32),
            "written": torch.tensor(loop_rate is not None),
            "late": torch.tensor(late),
            "loop_rate": torch.tensor(loop_rate or 0.0),
        }
        return row | answers_to_store(self._recipe, self._pair.target, row["ids"])

    # -- passages

    def passages(self) -> list[Passage]:
        """Held-out prompts, all contexts of one ending at the same token, and what the target writes; made once."""
        path = self._out / PASSAGES
        saved = {"key": self._passages_key, "complete": False, "passages": []}
        if path.exists():
            saved = read_json(path)
            if saved["key"] != self._passages_key:
                raise UserError(f"{path} was made for another recipe or target", "Give another --out")
        if not saved["complete"]:
            self._out.mkdir(parents=True, exist_ok=True)
            self._write_passages(saved, path)
        return [
            Passage(p["dataset"], tuple(p["prompt"]), tuple(p["text"]), p["limit"], tuple(p["probs"]))
            for p in saved["passages"]
        ]

    def _write_passages(self, saved: dict, path: Path) -> None:
        """Add what is missing of `saved`, some prompts at a time, and save it in `path` after each."""
        e, temperature = self._recipe.evaluation, self._recipe.temperature
        sources, longest = e.sources or self._recipe.data.sources, max(e.contexts)
        prompts = held_out_prompts(self._pair.tokenizer, sources, longest, e.passages, bool(e.sources), self._progress)
        wanted = [(n, name, ids[longest - c :]) for n, (name, ids) in enumerate(prompts) for c in e.contexts]
        at_once = max(1, self._writer.together // len(e.contexts)) * len(e.contexts)  # whole prompts
        for place in range(len(saved["passages"]), len(wanted), at_once):
            if time.monotonic() > self._deadline and place:
                break
            seeds, names, ids = zip(*wanted[place : place + at_once])
            texts = self._writer.write(ids, e.new_tokens, temperature, seeds)
            saved["passages"] += map(self._passage, names, ids, texts)
            self._progress.advance("held-out passages", len(saved["passages"]), len(wanted))
            write_file(path, json.dumps(saved))
        saved["complete"] = True
        write_file(path, json.dumps(saved))

    def _passage(self, name: str, prompt: list[int], text: list[int] | None) -> dict:
        """A passage as it is saved, with its loop rate. Raises NonFiniteError where the target broke."""
        if text is None:
            raise non_finite("target")
        sampling, limit = Sampling(self._recipe.temperature), self._recipe.evaluation.new_tokens
        probs = () if sampling.greedy else text_probs(self._pair.target, prompt, text, sampling)
        loop_rate = sum(looped_tokens(prompt, text)) / len(text)
        return asdict(Passage(name, tuple(prompt), tuple(text), limit, tuple(probs))) | {"loop_rate": loop_rate}


def _check_shard(path: Path, sha256: str) -> None:
    """Raise UserError where a shard is not what the manifest says."""
    if not path.exists():
        raise UserError(f"{path} is missing", "Restore it, or remove the folder to make all shards again")
    if digest(path.read_bytes()) != sha256:
        raise UserError(f"{path} is damaged", "Restore it, or remove the folder to make all shards again")


def _dump(value: object) -> str:
    return json.dumps(value, indent=1)
