"""An experiment: the cells of a recipe, and which of their texts are stored already.

Its key covers the recipe, the models, the prompts, the machine and the revision, so that a sweep which is started again
continues with what is missing.
"""

from __future__ import annotations

from dataclasses import asdict

from bdcli.base.errors import UserError
from bdcli.base.files import digest
from bdcli.base.provenance import git_revision, machine, versions
from bdcli.bench.methods import Models
from bdcli.bench.outcome import Method
from bdcli.config.bench import DRAFTING, BenchRecipe
from bdcli.config.loader import as_dict
from bdcli.data.samples import Sample, ids_digest, load_samples
from bdcli.model.checkpoint import fingerprint
from bdcli.model.hub import resolve
from bdcli.results.schema import Prompt, Run
from bdcli.results.store import Store, running


class Experiment:
    """Samples, cells and stored texts of one recipe in one store. `fresh` measures again what is stored already."""

    def __init__(self, recipe: BenchRecipe, store: Store, models: Models, fresh: bool = False):
        self.recipe, self.store, self.models = recipe, store, models
        longest = max(recipe.contexts)
        self._check_length(longest + recipe.max_new_tokens)
        self.samples = {
            name: load_samples(models.pair.tokenizer, name, sources, recipe.samples, longest)
            for name, sources in recipe.datasets.items()
        }
        self.key = self._key(fresh)
        self._cells: dict[tuple[str, int, str], str] = {
            (run.dataset, run.context, run.arm): run.run_id for run in store.runs(self.key)
        }
        self.work = [
            (self.samples[dataset][n], context)
            for n in range(recipe.samples)
            for context in sorted(recipe.contexts)
            for dataset in recipe.datasets
            if n < len(self.samples[dataset])
        ]

    def _check_length(self, needed: int) -> None:
        names = {self.recipe.target: self.models.pair.target, self.recipe.drafter: self.models.pair.drafter}
        for name, model in names.items():
            limit = min(model.config.max_position, model.config.sliding_window or model.config.max_position)
            if needed > limit:
                raise UserError(
                    f"{max(self.recipe.contexts)} prompt + {self.recipe.max_new_tokens} new tokens exceed the {limit} "
                    f"positions of {name}",
                    "Lower --ctx or --max-new-tokens",
                )

    def _key(self, fresh: bool) -> str:
        """Digest of everything that a figure depends on, and a number: `fresh` takes the next one."""
        r = self.recipe
        folders = [resolve(r.target, "target"), resolve(r.drafter, "drafter")]
        folders += [resolve(name, "drafter") for arm in r.arms.values() if (name := r.drafter_of(arm)) is not None]
        prompts = [ids_digest(s.prompt(max(r.contexts))) for samples in self.samples.values() for s in samples]
        parts = [as_dict(r), [fingerprint(f) for f in folders], prompts, machine(), versions(), git_revision()]
        base = digest(parts)[:16]
        stored = {run.experiment for run in self.store.runs() if (run.experiment or "").startswith(base)}
        last = max((int(key.rpartition("-")[2]) for key in stored), default=0)
        if last and any(running(run) for run in self.store.runs(f"{base}-{last}")):
            raise UserError("another process is measuring this very experiment", "Wait for it, or change the recipe")
        return f"{base}-{last + 1 if fresh or not last else last}"

    def plan(self) -> list[str]:
        """What a sweep will do, in lines."""
        r, missing = self.recipe, sum(len(self._missing(s, c)) for s, c in self.work)
        total = sum(len(r.arms_at(c)) for _, c in self.work)
        contexts = ", ".join(map(str, sorted(r.contexts)))
        counts = ", ".join(f"{len(samples)} of {name}" for name, samples in self.samples.items())
        lines = [
            f"{len(r.arms)} arms × contexts {contexts} × prompts {counts}: {total} texts of {r.max_new_tokens} tokens",
            f"experiment {self.key}: {total - missing} of {total} texts are stored, {missing} are to be written",
        ]
        if r.naive is not None and resolve(r.naive, "drafter") == resolve(r.drafter, "drafter"):
            lines.append("naive and drafter are the same model: the bd arms measure an undistilled drafter")
        return lines

    def runs(self) -> list[Run]:
        """Rows of all cells, by data set, context, and order of the recipe's arms."""
        arms, datasets = list(self.recipe.arms), list(self.recipe.datasets)
        return sorted(
            self.store.runs(self.key), key=lambda r: (datasets.index(r.dataset), r.context, arms.index(r.arm))
        )

    def rows(self, sample: Sample, context: int) -> dict[str, Prompt]:
        """Stored texts of one prompt, by arm."""
        found = {}
        for name in self.recipe.arms_at(context):
            run_id = self._cells.get((sample.dataset, context, name))
            rows = self.store.prompts(run_id) if run_id else []
            row = next((row for row in rows if row.index == sample.index), None)
            if row is not None:
                found[name] = row
        return found

    def _missing(self, sample: Sample, context: int) -> list[str]:
        """Arms that have no text for this prompt."""
        stored = self.rows(sample, context)
        return [name for name in self.recipe.arms_at(context) if name not in stored]

    def cell(self, dataset: str, context: int, name: str, method: Method) -> str:
        """run_id of an arm's cell, its row begun or reopened."""
        key = (dataset, context, name)
        if key in self._cells:
            self.store.reopen(self._cells[key])
            return self._cells[key]
        r, pair, arm = self.recipe, self.models.pair, self.recipe.arms[name]
        settings = {k: v for k, v in as_dict(r).items() if k not in ("arms", "datasets", "contexts")}
        drafter = r.drafter_of(arm)
        self._cells[key] = self.store.begin(
            "bench",
            settings
            | {"arm": asdict(arm), "sources": r.datasets[dataset], "eos": sorted(pair.eos)}
            | {"beside": list(r.arms_at(context))},
            experiment=self.key,
            arm=name,
            method=arm.method,
            dataset=dataset,
            context=context,
            target=pair.names[0],
            drafter=drafter and self.models.with_drafter(drafter).names[1],
            device=str(pair.target.device),
            attention=pair.backend.name,
            dtype=arm.dtype or str(pair.target.dtype).removeprefix("torch."),
            budget="full" if arm.method == "full" else arm.budget,
            gamma=arm.gamma if arm.method in DRAFTING else 0,
            temperature=r.temperature,
            top_k=r.top_k,
            top_p=r.top_p,
            seed=r.seed,
            **method.columns(),
        )
        return self._cells[key]
