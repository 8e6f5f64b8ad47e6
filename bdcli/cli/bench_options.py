"""The options of `bdcli bench`, turned into a bench recipe or into what is measured of a pair of shapes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bdcli.base.errors import UserError
from bdcli.base.streams import printable
from bdcli.config.bench import ENGINE_METHODS, PEER_METHODS, BenchRecipe, crossed_arms
from bdcli.config.decode import DecodeOptions, parse_budget, parse_context, parse_gamma
from bdcli.config.loader import load_recipe

QUICK = ("samples=2", "max_new_tokens=32")
QUICK_REPEATS = 3  # of a step of a shape
PROTOCOLS = ("default", "paper")
SHAPE_CONTEXTS = "4k,8k,16k"
# options that are settings of the recipe by the same name
SETTINGS = (
    "samples",
    "max_new_tokens",
    "temperature",
    "seed",
    "dtype",
    "device",
    "engine",
    "target",
    "drafter",
    "weights",
    "draft_weights",
    "naive",
)


@dataclass(frozen=True)
class BenchOptions:
    """Options as they were typed; None where one was left out."""

    recipe: Path | None
    overrides: list[str]
    prompts: list[Path] | None
    ctx: str | None
    datasets: str | None
    budgets: str | None
    gamma: str | None
    methods: str | None
    arms: str | None
    samples: int | None
    max_new_tokens: int | None
    temperature: float | None
    seed: int | None
    dtype: str | None
    device: str | None
    engine: str | None
    target: str | None
    drafter: str | None
    weights: str | None
    draft_weights: str | None
    naive: str | None
    select: str | None
    protocol: str | None
    quick: bool

    def bench_recipe(self) -> BenchRecipe:
        """The recipe with every option; an option wins over --set, that over --protocol, that over the file."""
        changes = self._protocol_settings() + self.overrides + list(QUICK if self.quick else ())
        changes += [_override(name, value) for name in SETTINGS if (value := getattr(self, name)) is not None]
        if self.ctx is not None:
            changes.append(_override("contexts", [parse_context(word) for word in words(self.ctx)]))
        if datasets := self._datasets():
            changes.append(_override("datasets", datasets))
        if self.methods or self.budgets or self.gamma or self.select:
            changes.append(_override("arms", self._crossed_arms()))
        recipe = load_recipe(self.recipe, BenchRecipe, changes)
        return recipe if self.arms is None else only_arms(recipe, words(self.arms))

    def _protocol_settings(self) -> list[str]:
        """Overrides of a protocol. A recipe has settings of its own; then the protocol only says what is shown."""
        if self.protocol not in (None, *PROTOCOLS):
            raise UserError(f"--protocol {self.protocol}: unknown", f"Known: {', '.join(PROTOCOLS)}")
        if self.protocol == "paper" and self.recipe is None:
            from bdcli.bench.paper import settings

            return settings()
        return [] if self.protocol is None else [f"protocol={self.protocol}"]

    def _datasets(self) -> dict[str, list[str]]:
        """{name: sources}. The files of --prompts are one data set, named after the file when there is one."""
        named = dict(map(_dataset, words(self.datasets))) if self.datasets is not None else {}
        for path in self.prompts or ():
            if not path.is_file():
                raise UserError(f"prompt file {path} does not exist", "Give a UTF-8 text file, or leave --prompts out")
        if self.prompts:
            name = printable(self.prompts[0].stem) if len(self.prompts) == 1 else "prompts"
            named[name] = [str(path) for path in self.prompts]
        return named

    def _crossed_arms(self) -> dict[str, dict]:
        """Arms crossed from options; one left out means ar and bd, budget 512, γ auto."""
        methods, known = words(self.methods or "ar,bd"), (*ENGINE_METHODS, *PEER_METHODS)
        for name in methods:
            if name not in known:
                raise UserError(f"--methods {name}: unknown", f"Known: {', '.join(known)}")
        budgets = [parse_budget(word) or "full" for word in words(self.budgets or "512")]
        gammas = [parse_gamma(word) or "auto" for word in words(self.gamma or "auto")]
        arms = crossed_arms(methods, budgets, gammas, **({"select": self.select} if self.select else {}))
        return {name: asdict(arm) for name, arm in arms.items()}

    def shape_options(self, shape: str) -> ShapeOptions:
        """What is measured of a pair of shapes. Raises UserError on options that have no meaning there."""
        texts = {"recipe": self.recipe, "--prompts": self.prompts, "--datasets": self.datasets}
        texts |= {"--methods": self.methods, "--arms": self.arms}
        for name, value in texts.items():
            if value is not None:
                raise UserError(f"--shape measures random weights and takes no {name}", "Leave one of them out")
        given = {name: value for name in ("dtype", "device", "engine") if (value := getattr(self, name)) is not None}
        checked = DecodeOptions(**given)
        if checked.engine == "transformers":
            raise UserError("--shape has no model of transformers to measure", "Leave --engine out")
        gammas = None if self.gamma is None else tuple(parse_gamma(word) for word in words(self.gamma))
        if None in (gammas or ()):
            raise UserError("--gamma auto has no meaning for --shape", "Give numbers: 1,3,7")
        return ShapeOptions(
            shape=shape,
            contexts=tuple(parse_context(word) for word in words(self.ctx or SHAPE_CONTEXTS)),
            dtype=checked.dtype,
            device=checked.device,
            engine=checked.engine,
            budgets=None if self.budgets is None else tuple(parse_budget(word) for word in words(self.budgets)),
            gammas=gammas,
            repeats=QUICK_REPEATS if self.quick else None,
        )


@dataclass(frozen=True)
class ShapeOptions:
    """A pair of shapes and how it is measured; None is the default of `ShapeBench`."""

    shape: str
    contexts: tuple[int, ...]
    dtype: str
    device: str
    engine: str
    budgets: tuple[int | None, ...] | None
    gammas: tuple[int, ...] | None
    repeats: int | None

    @property
    def choices(self) -> dict:
        """What was chosen of `ShapeBench`."""
        values = {name: getattr(self, name) for name in ("budgets", "gammas", "repeats")}
        return {name: value for name, value in values.items() if value is not None}

    def config(self) -> dict:
        """As the store keeps it."""
        config = asdict(self)
        return {name: config[name] for name, value in config.items() if value is not None and name != "repeats"}


def words(text: str) -> list[str]:
    """The words of a list with commas. Raises UserError where there are none."""
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise UserError(f"{text!r} names nothing", "Give names with commas between them")
    return found


def only_arms(recipe: BenchRecipe, names: list[str]) -> BenchRecipe:
    """The recipe with these arms alone, AR with them."""
    for name in names:
        if name not in recipe.arms:
            raise UserError(f"--arms {name}: no such arm", f"Arms: {', '.join(recipe.arms)}")
    arms = {name: arm for name, arm in recipe.arms.items() if name in names or arm.method == "ar"}
    return replace(recipe, arms=arms)


def _dataset(word: str) -> tuple[str, list[str]]:
    """(name, sources) of NAME=PLACE, of a path, which is named after the file, or of a known data set."""
    name, equals, source = word.partition("=")
    if not equals and Path(word).exists():
        return printable(Path(word).stem), [word]
    return name, [source or name]


def _override(name: str, value: object) -> str:
    return f"{name}={json.dumps(value)}"
