"""An experiment: the prompts and cells of a recipe, and which of their texts are stored already. It only reads.

    sample × context × data set  ->  one task: every arm of the recipe generates after this prompt

Its key covers the recipe, the models, the prompts, the machine and the revision, so that a sweep which is started again
continues with what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bdcli.backends.transformers_engine import read_target_config
from bdcli.base.errors import UserError
from bdcli.base.files import digest
from bdcli.base.provenance import git_revision, machine, versions
from bdcli.bench.methods import present, tool_versions
from bdcli.cache.selection import parse_selection
from bdcli.config.bench import TRANSFORMERS_METHODS, BenchRecipe
from bdcli.config.decode import OWN, SELECTIONS
from bdcli.config.loader import as_dict
from bdcli.data.document import Unread
from bdcli.data.samples import Sample, ids_digest, load_samples
from bdcli.decode.positions import positions_note
from bdcli.model.checkpoint import fingerprint, read_config
from bdcli.model.hub import resolve
from bdcli.model.tokenizer import check_vocabulary, load_tokenizer
from bdcli.results.processes import computed_elsewhere
from bdcli.results.schema import Prompt, Run
from bdcli.results.store import Store

OVERHEAD_TOKENS = 8192  # an arm costs as if its context were this much longer
KEY_DIGITS = 16


class Cell(NamedTuple):
    """One arm on one data set and context."""

    dataset: str
    context: int
    arm: str


class Task(NamedTuple):
    """All arms after one prompt. `turn` counts tasks, and with it the order of the arms rotates."""

    sample: Sample
    context: int
    turn: int

    @property
    def cost(self) -> int:
        """Of each arm, in tokens."""
        return self.context + OVERHEAD_TOKENS

    def cell(self, arm: str) -> Cell:
        return Cell(self.sample.dataset, self.context, arm)


class Experiment:
    """A recipe in one store, without the arms of absent tools; `fresh` measures again what is stored already.

    Raises UserError on texts and models that do not fit the recipe. No weights are loaded.
    """

    def __init__(self, recipe: BenchRecipe, store: Store, fresh: bool = False):
        recipe, self.absent = present(recipe)
        self.recipe, self.store = recipe, store
        self.ar = next(name for name, arm in recipe.arms.items() if arm.method == "ar")
        self._folders = self._find_models()
        target, *drafters = self._folders
        read = read_target_config if recipe.engine == "transformers" else read_config
        self._limit = read(target).context_limit
        for folder in drafters:
            read_config(folder)
        tokenizer, longest = load_tokenizer(self._folders[0]), max(recipe.contexts)
        for folder in dict.fromkeys(self._folders[1:]):
            check_vocabulary(self._folders[0], folder, tokenizer)
        self._check_length(longest + recipe.max_new_tokens)
        self._unread = Unread()
        self.samples = {
            name: load_samples(
                tokenizer, name, sources, recipe.samples, longest, special=recipe.special_tokens, unread=self._unread
            )
            for name, sources in recipe.datasets.items()
        }
        self.key = self._key(fresh)
        self.run_ids = {Cell(run.dataset, run.context, run.arm): run.run_id for run in store.runs(self.key)}
        prompts = [
            (self.samples[dataset][n], context)
            for n in range(recipe.samples)
            for context in sorted(recipe.contexts)
            for dataset in recipe.datasets
            if n < len(self.samples[dataset])
        ]
        self.tasks = [Task(*prompt, turn) for turn, prompt in enumerate(prompts)]

    def _find_models(self) -> list[Path]:
        """Where the target, the drafter, and the drafter of every arm that has one are."""
        r = self.recipe
        names = [r.drafter, *(name for arm in r.arms.values() if (name := r.drafter_of(arm)) is not None)]
        target = resolve(r.target, "target")
        found = [target, *(target if name == OWN else resolve(name, "drafter") for name in names)]
        peer = next((arm.method for arm in r.arms.values() if arm.method in TRANSFORMERS_METHODS), None)
        file = next((path for path in found if path.is_file()), None)
        if peer is not None and file is not None:
            hint = f"Give the folder that this makes: bdcli convert {file} NEW_FOLDER"
            raise UserError(f"{peer} runs transformers, which needs a Hugging Face folder in place of {file}", hint)
        return found

    def _check_length(self, needed: int) -> None:
        """Texts of `needed` tokens fit into the target. A drafter may have fewer positions (see `plan`)."""
        if needed > self._limit:
            raise UserError(
                f"{max(self.recipe.contexts)} prompt + {self.recipe.max_new_tokens} new tokens exceed the "
                f"{self._limit} positions of {self.recipe.target}",
                "Lower --ctx or --max-new-tokens",
            )

    def _key(self, fresh: bool) -> str:
        """Digest of everything that a figure depends on, and a number: `fresh` takes the next one."""
        longest = max(self.recipe.contexts)
        prompts = [ids_digest(sample.prompt(longest)) for samples in self.samples.values() for sample in samples]
        models = [fingerprint(folder) for folder in self._folders]
        parts = [as_dict(self.recipe), models, prompts, machine(), versions() | tool_versions(self.recipe)]
        parts.append(git_revision())
        base = digest(parts)[:KEY_DIGITS]
        stored = {run.experiment for run in self.store.runs() if (run.experiment or "").startswith(base)}
        last = max((int(key.rpartition("-")[2]) for key in stored), default=0)
        if last and any(computed_elsewhere(run) for run in self.store.runs(f"{base}-{last}")):
            raise UserError("another process is measuring this very experiment", "Wait for it, or change the recipe")
        return f"{base}-{last + 1 if fresh or not last else last}"

    @property
    def cost(self) -> int:
        """Of all tasks, in tokens."""
        return sum(task.cost * len(self.recipe.arms_at(task.context)) for task in self.tasks)

    def plan(self) -> list[str]:
        """What a sweep will do, in lines."""
        r = self.recipe
        total = sum(len(r.arms_at(task.context)) for task in self.tasks)
        missing = total - sum(len(self.stored(task)) for task in self.tasks)
        contexts = ", ".join(map(str, sorted(r.contexts)))
        counts = ", ".join(f"{len(samples)} of {name}" for name, samples in self.samples.items())
        lines = [
            f"{len(r.arms)} arms × contexts {contexts} × prompts {counts}: {total} texts of {r.max_new_tokens} tokens",
            f"experiment {self.key}: {total - missing} of {total} texts are stored, {missing} are to be written",
        ]
        if r.naive is not None and resolve(r.naive, "drafter") == self._folders[1]:
            lines.append("naive and drafter are the same model: the bd arms measure an undistilled drafter")
        return [*lines, *self._position_notes(), *self._unread.lines(), *self.absent]

    def _position_notes(self) -> Iterator[str]:
        """A line for each arm whose drafter was made for fewer positions than it is asked for."""
        r = self.recipe
        for name, arm in r.arms.items():
            drafter = r.drafter_of(arm)
            if drafter not in (None, OWN):
                select = arm.method if arm.method in SELECTIONS else arm.select
                selection = parse_selection(arm.budget, select, arm.positions, arm.gamma)
                longest = max(arm.contexts or r.contexts) + r.max_new_tokens
                note = positions_note(read_config(resolve(drafter, "drafter")), selection, longest)
                if note:
                    yield f"{name}: {note}"

    def notes(self) -> list[str]:
        """Lines about texts that spell special tokens."""
        found = {sample.source.rpartition("@")[0]: sample.note for group in self.samples.values() for sample in group}
        hint = "--set special_tokens=text reads them as text"
        return [f"{name}: {note}; {hint}" for name, note in found.items() if note is not None]

    def stored(self, task: Task) -> dict[str, Prompt]:
        """Rows of the arms that have generated after this prompt already."""
        found = {}
        for arm in self.recipe.arms_at(task.context):
            run_id = self.run_ids.get(task.cell(arm))
            rows = self.store.prompts(run_id) if run_id else []
            row = next((row for row in rows if row.index == task.sample.index), None)
            if row is not None:
                found[arm] = row
        return found

    def runs(self) -> list[Run]:
        """Rows of all cells, by data set, context, and order of the recipe's arms."""
        datasets, arms = list(self.recipe.datasets), list(self.recipe.arms)

        def place(run: Run) -> tuple[int, int, int]:
            return datasets.index(run.dataset), run.context, arms.index(run.arm)

        return sorted(self.store.runs(self.key), key=place)
