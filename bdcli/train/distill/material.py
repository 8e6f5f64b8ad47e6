"""What a distil run learns from and is measured on: shards of training windows, and passages that the target wrote.

documents -> candidate windows -> some with an end written by the target -> filter -> shards, with the target's answers
held-out documents -> prompts of every context -> what the target writes after each

Everything is made once under a key of all it depends on. A shard appears whole or not at all and is then listed in
the manifest; a stopped run goes on at the first shard that is missing, and ends with the same files and accounts. A
shard holds columns of equal length; `datasets.Dataset.from_dict(safetensors.numpy.load_file(shard))` is a table of it.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from bdcli.base.errors import UserError
from bdcli.base.files import digest, read_json, write_file
from bdcli.config.distill import DistillRecipe
from bdcli.data.sources import CHARACTERS, Candidate, Documents, held_out_prompts
from bdcli.decode.pair import Pair
from bdcli.results.metrics import looped_tokens
from bdcli.speculation.sampling import Sampling, non_finite
from bdcli.train.acceptance import Passage, text_probs
from bdcli.train.distill.checks import MANIFEST, PASSAGES, differing, passages_made_from, windows_made_from
from bdcli.train.distill.writer import Writer
from bdcli.train.forward import final_rows
from bdcli.train.losses import ArgmaxTarget, HiddenTarget, Target, TopKTarget


@dataclass
class Accounts:
    """What became of what was read: read = kept + Σ dropped + failed."""

    read: int
    kept: int
    dropped: dict[str, int]
    failed: int

    def count(self, fate: str) -> None:
        """`fate` is kept, failed, or why it was dropped."""
        self.read += 1
        if fate in ("kept", "failed"):
            setattr(self, fate, getattr(self, fate) + 1)
        else:
            self.dropped[fate] = self.dropped.get(fate, 0) + 1


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
        progress: Callable[[str, int, int, str], None] = lambda *_: None,
        deadline: float = math.inf,
    ):
        self._recipe, self._out, self._pair, self._progress = recipe, out, pair, progress
        self._deadline = deadline
        self._writer = Writer(pair, recipe.data.together)
        self._parts = windows_made_from(recipe, *folders) | {"dtype": str(pair.target.dtype)}
        self._passages_key = passages_made_from(recipe, folders[0])

    # -- windows

    def windows(self) -> Windows:
        """All shards, made where they are missing. Raises UserError on a damaged shard or another key."""
        self._out.mkdir(parents=True, exist_ok=True)
        manifest = self._manifest()
        d = self._recipe.data
        if not manifest["complete"]:
            documents = Documents(d.sources, CHARACTERS * d.windows * d.context)
            manifest["documents"] = asdict(Accounts(*documents.accounts))
            self._make_shards(manifest, documents)
        return Windows(self._out, manifest, self._pair.target.head, self._recipe)

    def _manifest(self) -> dict:
        path = self._out / MANIFEST
        if not path.exists():
            return {"parts": self._parts, "complete": False, "documents": None, "shards": []}
        manifest = read_json(path)
        other = differing(manifest["parts"], self._parts)
        if other:
            raise UserError(
                f"{path} was made for another {other[0]}", "Use the recipe it was made by, or another --out"
            )
        for shard in manifest["shards"]:
            _check(self._out / shard["file"], shard["sha256"])
        return manifest

    def _make_shards(self, manifest: dict, documents: Documents) -> None:
        """Shards from the first missing one on, each followed by a new manifest."""
        d, shards = self._recipe.data, manifest["shards"]
        answer = d.written_tokens if d.written else 0
        candidates = documents.windows(self._pair.tokenizer, d.context, self._recipe.seed, answer)
        made, at = sum(s["accounts"]["kept"] for s in shards), shards[-1]["next"] if shards else 0
        next(islice(candidates, at, at), None)  # pass over what earlier shards were made of
        ended = False
        while made < d.windows and not ended:
            wanted, accounts, kept, rates = min(d.shard_windows, d.windows - made), Accounts(0, 0, {}, 0), [], {}
            while len(kept) < wanted and not ended:
                group = list(islice(candidates, min(self._writer.together, wanted - len(kept))))
                ended = not group
                for number, (fate, loop_rate, sample) in enumerate(self._samples(at, group), at):
                    accounts.count(fate)
                    kept += [] if sample is None else [sample]
                    rates |= {} if loop_rate is None else {number: loop_rate}
                at += len(group)
                self._progress("windows", made + len(kept), d.windows, f"{sum(accounts.dropped.values())} dropped")
            if kept:
                name = f"windows-{len(shards):05}.safetensors"
                sha = self._write_shard(self._out / name, kept)
                late = sum(int(sample["late"]) for sample in kept)
                shard = {"file": name, "sha256": sha, "next": at, "late": late, "accounts": asdict(accounts)}
                shards.append(shard | {"loop_rates": rates})  # of every text written, by candidate, dropped ones too
                made += len(kept)
                write_file(self._out / MANIFEST, _dump(manifest))
        if made < d.windows:
            raise UserError(
                f"{', '.join(d.sources)} holds {made} windows of {d.context} tokens, not {d.windows}",
                "Lower data.windows or add sources",
            )
        manifest["complete"] = True
        write_file(self._out / MANIFEST, _dump(manifest))

    def _samples(
        self, first: int, group: list[Candidate]
    ) -> Iterator[tuple[str, float | None, dict[str, Tensor] | None]]:
        """(fate, loop rate of what was written, tensors of the window) of candidates `first`, `first` + 1, ..."""
        r, d = self._recipe, self._recipe.data
        late = time.monotonic() > self._deadline
        chosen = [c.asked or random.Random(f"{r.seed}/{n}").random() < d.written for n, c in enumerate(group, first)]
        numbers = [n for n, wanted in enumerate(chosen, first) if wanted and not late]
        prompts = {n: c.ids if c.asked else c.ids[: -d.written_tokens] for n, c in enumerate(group, first)}
        warmth = r.temperature if d.written_temperature is None else d.written_temperature
        texts = self._writer.write([prompts[n] for n in numbers], d.written_tokens, warmth, seeds=numbers)
        texts = dict(zip(numbers, texts, strict=True))
        for number, (candidate, wanted) in enumerate(zip(group, chosen), first):
            if number not in texts:
                unanswered = candidate.asked  # corpus text goes on, a question does not
                yield ("late", None, None) if unanswered else ("kept", None, self._window(candidate.ids, None, wanted))
                continue
            text, prompt = texts[number], prompts[number]
            looped = sum(looped_tokens(prompt, text)) / len(text) if text else None
            if text is None:
                yield "failed", None, None
            elif len(text) < d.written_tokens:
                yield "ended early", looped, None
            elif looped > d.max_loop_rate:
                yield "loops", looped, None
            else:
                yield "kept", looped, self._window(prompt + text, looped, False)

    def _window(self, ids: list[int], loop_rate: float | None, late: bool) -> dict[str, Tensor]:
        """Tensors of a window; `loop_rate` None where the target wrote none of it."""
        sample = {
            "ids": torch.tensor(ids, dtype=torch.int32),
            "written": torch.tensor(loop_rate is not None),
            "late": torch.tensor(late),
            "loop_rate": torch.tensor(loop_rate or 0.0),
        }
        return sample | self._answers(sample["ids"])

    @torch.no_grad()
    def _answers(self, ids: Tensor) -> dict[str, Tensor]:
        """The target's answers that `data.cache` asks for."""
        d, target = self._recipe.data, self._pair.target
        if d.cache == "none":
            return {}
        hidden = final_rows(target, ids.long().to(target.device))
        if d.cache == "hidden":
            return {"hidden": hidden.bfloat16().cpu()}
        index, log_probs, best = [], [], []
        for rows in hidden.split(512):
            logits = torch.nn.functional.linear(rows, target.head).float()
            best.append(logits.argmax(-1).int().cpu())
            if d.cache == "topk":
                top = (logits / self._recipe.loss.temperature).log_softmax(-1).topk(d.top_k)
                index.append(top.indices.int().cpu())
                log_probs.append(top.values.half().cpu())
        if d.cache == "argmax":
            return {"argmax": torch.cat(best)}
        return {"index": torch.cat(index), "log_probs": torch.cat(log_probs)}

    def _write_shard(self, path: Path, kept: list[dict[str, Tensor]]) -> str:
        """Write samples stacked, atomically; returns the file's sha256."""
        from safetensors.torch import save

        body = save({name: torch.stack([sample[name] for sample in kept]) for name in kept[0]}, {"format": "pt"})
        write_file(path, body)
        return digest(body)

    # -- passages

    def passages(self) -> list[Passage]:
        """Held-out prompts, all contexts of one ending at the same token, and what the target writes; made once."""
        path, r = self._out / PASSAGES, self._recipe
        e, saved = r.evaluation, {"key": self._passages_key, "complete": False, "passages": []}
        if path.exists():
            saved = read_json(path)
            if saved["key"] != self._passages_key:
                raise UserError(f"{path} was made for another recipe or target", "Give another --out")
        if not saved["complete"]:
            self._out.mkdir(parents=True, exist_ok=True)
            longest, sampling = max(e.contexts), Sampling(r.temperature)
            prompts = held_out_prompts(
                self._pair.tokenizer, e.sources or r.data.sources, longest, e.passages, bool(e.sources)
            )
            wanted = [(n, name, ids, c) for n, (name, ids) in enumerate(prompts) for c in e.contexts]
            at_once = max(1, self._writer.together // len(e.contexts)) * len(e.contexts)  # whole prompts
            for place in range(len(saved["passages"]), len(wanted), at_once):
                if time.monotonic() > self._deadline and place:
                    break
                group = [(n, name, ids[longest - context :]) for n, name, ids, context in wanted[place:][:at_once]]
                texts = self._writer.write(
                    [prompt for _, _, prompt in group], e.new_tokens, r.temperature, seeds=[n for n, _, _ in group]
                )
                for (_, name, prompt), text in zip(group, texts, strict=True):
                    saved["passages"].append(self._passage(name, prompt, text, sampling))
                self._progress("held-out passages", len(saved["passages"]), len(wanted), "")
                write_file(path, json.dumps(saved))
            saved["complete"] = True
            write_file(path, json.dumps(saved))
        return [
            Passage(p["dataset"], tuple(p["prompt"]), tuple(p["text"]), p["limit"], tuple(p["probs"]))
            for p in saved["passages"]
        ]

    def _passage(self, name: str, prompt: list[int], text: list[int] | None, sampling: Sampling) -> dict:
        """A passage as it is saved, with its loop rate. Raises NonFiniteError where the target broke."""
        if text is None:
            raise non_finite("target")
        probs = () if sampling.greedy else text_probs(self._pair.target, prompt, text, sampling)
        limit = self._recipe.evaluation.new_tokens
        loop_rate = sum(looped_tokens(prompt, text)) / len(text)
        return asdict(Passage(name, tuple(prompt), tuple(text), limit, tuple(probs))) | {"loop_rate": loop_rate}


class Windows:
    """Finished shards, read when asked for."""

    def __init__(self, folder: Path, manifest: dict, head: Tensor, recipe: DistillRecipe):
        self._folder, self._shards, self._head, self._recipe = folder, manifest["shards"], head, recipe
        self._places = [(n, i) for n, shard in enumerate(self._shards) for i in range(shard["accounts"]["kept"])]
        self._open: tuple[int, dict[str, Tensor]] | None = None
        self.documents = Accounts(**manifest["documents"])
        self.accounts = Accounts(0, 0, {}, 0)
        self.loop_rates = [rate for shard in self._shards for rate in shard.get("loop_rates", {}).values()]
        for shard in self._shards:
            part = Accounts(**shard["accounts"])
            self.accounts.read, self.accounts.kept = self.accounts.read + part.read, self.accounts.kept + part.kept
            self.accounts.failed += part.failed
            for why, count in part.dropped.items():
                self.accounts.dropped[why] = self.accounts.dropped.get(why, 0) + count

    def __len__(self) -> int:
        return len(self._places)

    @property
    def shards(self) -> int:
        return len(self._shards)

    @property
    def bytes(self) -> int:
        return sum((self._folder / shard["file"]).stat().st_size for shard in self._shards)

    def ids(self, window: int) -> Tensor:
        """Token ids [T], int64."""
        return self._row(window)["ids"].long()

    def target(self, window: int) -> Target | None:
        """The target's cached answers for every position; None where none are cached."""
        row, device = self._row(window), self._head.device
        if "hidden" in row:
            return HiddenTarget(row["hidden"].to(device, self._head.dtype), self._head)
        if "index" in row:
            index, log_probs = row["index"].to(device), row["log_probs"].to(device)
            return TopKTarget(index, log_probs, self._recipe.loss.temperature)
        return ArgmaxTarget(row["argmax"].to(device)) if "argmax" in row else None

    def _row(self, window: int) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        number, place = self._places[window]
        if self._open is None or self._open[0] != number:
            self._open = number, load_file(self._folder / self._shards[number]["file"])
        return {name: t[place] for name, t in self._open[1].items()}


def bytes_per_token(recipe: DistillRecipe, hidden_size: int) -> int:
    """Disk bytes of one position of a window in a shard."""
    answers = {"none": 0, "hidden": 2 * hidden_size, "topk": 6 * recipe.data.top_k, "argmax": 4}
    return 4 + answers[recipe.data.cache]


def _check(path: Path, sha256: str) -> None:
    if not path.exists():
        raise UserError(f"{path} is missing", "Restore it, or remove the folder to make all shards again")
    if digest(path.read_bytes()) != sha256:
        raise UserError(f"{path} is damaged", "Restore it, or remove the folder to make all shards again")


def _dump(value: object) -> str:
    return json.dumps(value, indent=1)
