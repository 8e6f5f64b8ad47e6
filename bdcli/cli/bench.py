"""The command `bench`: options in, cells out. Heavy imports wait inside it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bdcli.base.console import end_interrupted, note, status_line
from bdcli.base.errors import BdcliError
from bdcli.base.streams import write_json, write_line
from bdcli.cli.bench_options import BenchOptions, ShapeOptions
from bdcli.cli.flags import MODEL_HELP, DbOption, JsonOption
from bdcli.cli.output import SweepProgress, show_table

if TYPE_CHECKING:
    from bdcli.config.bench import BenchRecipe
    from bdcli.results.store import Store


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
            help="With commas: ar,bd,full,window,chunk,official,lookup; transformers: hf-ar,hf-static,hf-assisted,"
            "hf-lookup; other tools: llama-cpp,llama-cpp-ngram,vllm, openvino,openvino-sdpa,openvino-int8,"
            "openvino-int4. Crossed with these."
        ),
    ] = None,
    arms: Annotated[str | None, typer.Option(help="Only these arms of the recipe, by name.")] = None,
    samples: Annotated[int | None, typer.Option(help="Prompts of each data set, in all.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens to write after each.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...")] = None,
    engine: Annotated[str | None, typer.Option(help="auto, triton, compiled, torch or transformers.")] = None,
    target: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    drafter: Annotated[str | None, typer.Option(help="As --target, or self.")] = None,
    weights: Annotated[str | None, typer.Option(help="Of the target: auto, bf16, int8 or int4.")] = None,
    draft_weights: Annotated[str | None, typer.Option(help="Of the drafters: auto, bf16, int8 or int4.")] = None,
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
    options = BenchOptions(
        recipe=recipe,
        overrides=overrides or [],
        prompts=prompts,
        ctx=ctx,
        datasets=datasets,
        budgets=budgets,
        gamma=gamma,
        methods=methods,
        arms=arms,
        samples=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        dtype=dtype,
        device=device,
        engine=engine,
        target=target,
        drafter=drafter,
        weights=weights,
        draft_weights=draft_weights,
        naive=naive,
        select=select,
        protocol=protocol,
        quick=quick,
    )
    from bdcli.results.store import Store

    settings = options.bench_recipe() if shape is None else options.shape_options(shape)
    with closing(Store(db, preview=dry_run)) as store:
        if shape is not None:
            _measure_shape(settings, store, dry_run, as_json)
        elif dry_run:
            _show_plan(settings, store, fresh)
        else:
            _measure(settings, store, fresh, as_json)


def _show_plan(recipe: BenchRecipe, store: Store, fresh: bool) -> None:
    """Print what would be measured. No model is loaded."""
    with status_line("loading torch"):
        from bdcli.bench.experiment import Experiment

        experiment = Experiment(recipe, store, fresh)
    for line in experiment.plan():
        note(line)


def _measure(recipe: BenchRecipe, store: Store, fresh: bool, as_json: bool) -> None:
    """Run a sweep and show its cells."""
    progress = SweepProgress()
    with status_line("loading torch and models"):
        from bdcli.bench.sweep import Sweep

        sweep = Sweep(recipe, store, progress, fresh)
    for line in sweep.experiment.plan():
        note(line)
    with progress:
        result = sweep.run()
    interrupted = result["status"] == "interrupted"
    if as_json:
        write_json(result)
    else:
        show_table([run for run in sweep.experiment.runs() if run.tokens_per_second or not interrupted])
        if recipe.protocol == "paper":
            from bdcli.bench.paper import lines

            write_line("\n" + "\n".join(lines(sweep.experiment.runs())))
    if interrupted:
        end_interrupted()
    for cell in result["cells"]:
        if not cell["valid"]:
            note(f"invalid: {cell['dataset']} {cell['context']} {cell['arm']}: {cell['invalid_reason']}")
    for line in result["remarks"]:
        note(line)
    if result["cells"] and not any(cell["samples"] for cell in result["cells"]):
        raise BdcliError("no cell could be measured", "The reasons stand above")


def _measure_shape(options: ShapeOptions, store: Store, dry_run: bool, as_json: bool) -> None:
    """Measure a pair of shapes and store the result as one run."""
    with status_line("loading torch"):
        from bdcli.base.devices import pick_device, pick_dtype
        from bdcli.bench.shapes import ShapeBench, lines, parse_shape
        from bdcli.decode.run import recorded

        shape, device = parse_shape(options.shape), pick_device(options.device)
        dtype = pick_dtype(options.dtype, device, options.engine)
        bench = ShapeBench(shape, options.contexts, dtype, device, **options.choices)
    if dry_run:
        note(bench.memory_plan().line())
        return
    progress = SweepProgress()
    bench.check_memory(progress)
    target, _, drafter = options.shape.partition("+")
    run_id = store.begin("shape", options.config(), target=target, drafter=drafter)
    with recorded(store, run_id):
        found = bench.measure(options.engine, progress)
    columns = {"device": str(device), "dtype": found["dtype"], "attention": found["engine"]}
    columns |= {"context": max(options.contexts), "peak_memory_bytes": found["peak_bytes"]}
    if as_json:
        write_json({"run_id": run_id, "shape": options.shape} | found)
    else:
        write_line("\n".join(lines(found)))
    store.finish(run_id, "done", config=options.config() | {"measured": found}, **columns)
