"""The command `bench`: options in, cells out. Heavy imports wait inside it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from bdcli.base.console import end_interrupted, note, status_line
from bdcli.base.errors import BdcliError, UserError
from bdcli.cli.flags import DbOption, JsonOption
from bdcli.cli.output import SweepProgress, show_table

QUICK = ("samples=2", "max_new_tokens=32")


def bench(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="YAML file, for example recipes/bench_pocket.yaml.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")
    ] = None,
    prompts: Annotated[list[Path] | None, typer.Option(help="Text file to cut prompts from; may be repeated.")] = None,
    ctx: Annotated[str | None, typer.Option(help="Contexts: 4k,8k,16k.")] = None,
    datasets: Annotated[
        str | None, typer.Option(help="stdlib, pg19, longbench/TASK, lwm, a path, or NAME=PATH; with commas.")
    ] = None,
    budgets: Annotated[str | None, typer.Option(help="KV budgets of the drafter: 256,512,full.")] = None,
    gamma: Annotated[str | None, typer.Option(help="Draft lengths: auto,3,5.")] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="ar,bd,full,window,chunk,official,lookup,hf-ar,hf-static,hf-assisted,hf-lookup; crossed with these."
        ),
    ] = None,
    arms: Annotated[str | None, typer.Option(help="Only these arms of the recipe, by name.")] = None,
    samples: Annotated[int | None, typer.Option(help="Prompts of each data set, in all.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens to write after each.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...")] = None,
    engine: Annotated[str | None, typer.Option(help="auto, triton, compiled or torch.")] = None,
    target: Annotated[str | None, typer.Option(help="Folder, hub name, or pocket.")] = None,
    drafter: Annotated[str | None, typer.Option(help="Folder, hub name, or pocket.")] = None,
    naive: Annotated[str | None, typer.Option(help="Undistilled drafter of the arms window and chunk.")] = None,
    select: Annotated[str | None, typer.Option(help="What bd arms made of --budgets keep: window or chunk.")] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="paper: its settings and γ grids, and its figures beside ours. [default: default]"),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Speed of a pair of shapes with random weights instead: llama2-7b+68m, ...")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two prompts, 32 tokens: does everything run?")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is stored already.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure arms side by side on the same prompts; an interrupted sweep continues where it stopped."""
    if shape is not None:
        given = {"recipe": recipe, "--prompts": prompts, "--datasets": datasets, "--methods": methods, "--arms": arms}
        if any(value is not None for value in given.values()):
            named = next(name for name, value in given.items() if value is not None)
            raise UserError(f"--shape measures random weights and takes no {named}", "Leave one of them out")
        flags = _ShapeFlags(shape, ctx, dtype, device, engine, budgets, gamma, quick)
        _measure_shape(flags, db, dry_run, as_json)
        return
    from bdcli.config.bench import BenchRecipe
    from bdcli.config.loader import load_recipe

    if protocol not in (None, "default", "paper"):
        raise UserError(f"--protocol {protocol}: unknown", "Known: default, paper")
    given = _protocol(protocol, recipe) + list(overrides or []) + list(QUICK if quick else ())
    plain = {"samples": samples, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    plain |= {"dtype": dtype, "device": device, "engine": engine, "target": target, "drafter": drafter, "naive": naive}
    given += [f"{key}={json.dumps(value)}" for key, value in plain.items() if value is not None]
    if ctx is not None:
        from bdcli.config.decode import parse_context

        given.append(f"contexts={json.dumps([parse_context(c) for c in _words(ctx)])}")
    named = _datasets(datasets, prompts)
    if named:
        given.append(f"datasets={json.dumps(named)}")
    if methods or budgets or gamma or select:
        given.append(f"arms={json.dumps(_arms(methods, budgets, gamma, select))}")
    settings = load_recipe(recipe, BenchRecipe, given)
    if arms is not None:
        settings = _only(settings, _words(arms))
    _measure(settings, db, fresh, dry_run, as_json)


class _ShapeFlags(NamedTuple):
    """What `--shape` measures, as it was typed."""

    name: str
    ctx: str | None
    dtype: str | None
    device: str | None
    engine: str | None
    budgets: str | None
    gamma: str | None
    quick: bool


def _measure_shape(flags: _ShapeFlags, db: str | None, dry_run: bool, as_json: bool) -> None:
    """Measure a pair of shapes and store the result as one run."""
    from bdcli.config.decode import DecodeOptions, parse_budget, parse_context, parse_gamma
    from bdcli.results.store import Store

    options = DecodeOptions(dtype=flags.dtype or "auto", device=flags.device or "auto", engine=flags.engine or "auto")
    contexts = [parse_context(c) for c in _words(flags.ctx or "4k,8k,16k")]
    given = {"shape": flags.name, "contexts": contexts} | {
        key: getattr(options, key) for key in ("dtype", "device", "engine")
    }
    chosen = {}
    if flags.budgets is not None:
        chosen["budgets"] = [parse_budget(b) for b in _words(flags.budgets)]
    if flags.gamma is not None:
        chosen["gammas"] = [parse_gamma(g) for g in _words(flags.gamma)]
        if None in chosen["gammas"]:
            raise UserError("--gamma auto has no meaning for --shape", "Give numbers: 1,3,7")
    store = Store(db, preview=dry_run)
    with status_line("loading torch"):
        from bdcli.base.devices import pick_device, pick_dtype
        from bdcli.bench import shapes
        from bdcli.decode.run import recorded

        pair, device = shapes.parse_shape(flags.name), pick_device(options.device)
        dtype = pick_dtype(options.dtype, device)
    bench = shapes.ShapeBench(pair, contexts, dtype, device, **chosen, **({"repeats": 3} if flags.quick else {}))
    if dry_run:
        note(f"{flags.name} at {', '.join(map(str, contexts))} tokens on {device}, {str(dtype).removeprefix('torch.')}")
        return
    target, drafter = flags.name.split("+")
    run_id = store.begin("shape", given | chosen, target=target, drafter=drafter)
    with recorded(store, run_id):
        found = bench.measure(options.engine, SweepProgress())
    columns = {"device": str(device), "dtype": found["dtype"], "attention": found["engine"]}
    columns |= {"context": max(contexts), "peak_memory_bytes": found["peak_bytes"]}
    store.finish(run_id, "done", config=given | chosen | {"measured": found}, **columns)
    if as_json:
        typer.echo(json.dumps({"run_id": run_id, "shape": flags.name} | found))
    else:
        typer.echo("\n".join(shapes.lines(found)))


def _protocol(name: str | None, recipe: Path | None) -> list[str]:
    """Overrides of a protocol. A recipe has settings of its own; then the protocol only says what is shown."""
    if name != "paper":
        return [] if name is None else [f"protocol={name}"]
    from bdcli.bench.paper import settings

    return settings() if recipe is None else ["protocol=paper"]


def _measure(settings, db: str | None, fresh: bool, dry_run: bool, as_json: bool) -> None:
    from bdcli.results.store import Store

    store = Store(db, preview=dry_run)
    with status_line("loading torch and models"):
        from bdcli.bench.sweep import Sweep

        progress = SweepProgress()
        sweep = Sweep(settings, store, progress, fresh)
    for line in sweep.experiment.plan():
        note(line)
    if dry_run:
        return
    with progress:
        result = sweep.run()
    unfinished = result["status"] == "interrupted"
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        show_table([r for r in sweep.experiment.runs() if r.tokens_per_second or not unfinished])
        if settings.protocol == "paper":
            from bdcli.bench.paper import lines

            typer.echo("\n" + "\n".join(lines(sweep.experiment.runs())))
    if unfinished:
        end_interrupted()
    for cell in result["cells"]:
        if not cell["valid"]:
            note(f"invalid: {cell['dataset']} {cell['context']} {cell['arm']}: {cell['invalid_reason']}")
    if result["cells"] and not any(cell["samples"] for cell in result["cells"]):
        raise BdcliError("no cell could be measured", "The reasons stand above")


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UserError(f"{text!r} names nothing", "Give names with commas between them")
    return words


def _datasets(datasets: str | None, prompts: list[Path] | None) -> dict[str, list[str]]:
    """{name: sources}. The files of --prompts are one data set, named after the file when there is one."""
    named: dict[str, list[str]] = {}
    for word in _words(datasets) if datasets is not None else []:
        name, equals, source = word.partition("=")
        if not equals and Path(word).exists():
            name, source = Path(word).stem, word
        named[name] = [source or name]
    if prompts:
        for path in prompts:
            if not path.is_file():
                raise UserError(f"prompt file {path} does not exist", "Give a UTF-8 text file, or leave --prompts out")
        named[prompts[0].stem if len(prompts) == 1 else "prompts"] = [str(path) for path in prompts]
    return named


def _arms(methods: str | None, budgets: str | None, gamma: str | None, select: str | None) -> dict[str, dict]:
    """Arms crossed from flags; a flag left out means ar and bd, budget 512, γ auto."""
    from dataclasses import asdict

    from bdcli.config.bench import ENGINE_METHODS, PEER_METHODS, crossed_arms
    from bdcli.config.decode import parse_budget, parse_gamma

    named = _words(methods or "ar,bd")
    for name in named:
        if name not in (*ENGINE_METHODS, *PEER_METHODS):
            raise UserError(f"--methods {name}: unknown", f"Known: {', '.join((*ENGINE_METHODS, *PEER_METHODS))}")
    sizes = [parse_budget(b) or "full" for b in _words(budgets or "512")]
    gammas = [parse_gamma(g) or "auto" for g in _words(gamma or "auto")]
    made = crossed_arms(named, sizes, gammas, **({"select": select} if select else {}))
    return {name: asdict(arm) for name, arm in made.items()}


def _only(settings, names: list[str]):
    """The recipe with these arms alone, AR with them."""
    unknown = [name for name in names if name not in settings.arms]
    if unknown:
        raise UserError(f"--arms {unknown[0]}: no such arm", f"Arms: {', '.join(settings.arms)}")
    kept = {f.name: getattr(settings, f.name) for f in fields(settings)}
    keep = {n: arm for n, arm in settings.arms.items() if n in names or arm.method == "ar"}
    return type(settings)(**kept | {"arms": keep})
