"""The command line: options in, text and tables out. Heavy imports wait inside the commands."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bdcli import __version__
from bdcli.base.console import note, status_line
from bdcli.base.errors import INTERRUPTED, BdcliError, UserError
from bdcli.base.interrupt import raise_interrupt
from bdcli.cli import train as training
from bdcli.cli.bench import bench
from bdcli.cli.flags import DbOption, JsonOption
from bdcli.cli.output import DecodeProgress, print_table, summary
from bdcli.config.decode import CHOICES, DecodeOptions, parse_budget, parse_context, parse_gamma

DEFAULT = DecodeOptions()

app = typer.Typer(
    name="bdcli",
    help="Lossless speculative decoding for long contexts with a drafter inside a fixed KV budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Select, Positions, Dtype, EngineName, BaselineMode, Trim = (
    StrEnum(name.title(), list(CHOICES[name]))
    for name in ("select", "positions", "dtype", "engine", "baseline", "trim")
)
Format = StrEnum("Format", ["table", "markdown", "csv", "json"])


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bdcli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    app.debug = debug


@app.command()
def decode(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT_FILE", help="UTF-8 text file, or - for standard input.")],
    budget: Annotated[str, typer.Option(help="KV entries the drafter may hold per layer and head, or full.")] = "512",
    gamma: Annotated[str, typer.Option(help="Tokens drafted per round, or auto.")] = "auto",
    select: Annotated[Select, typer.Option(help="What the drafter keeps of the prompt.")] = DEFAULT.select,
    positions: Annotated[Positions, typer.Option(help="Places of kept keys: ranks, or true.")] = DEFAULT.positions,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = DEFAULT.temperature,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 is off.")] = DEFAULT.top_k,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to mass p.")] = DEFAULT.top_p,
    seed: Annotated[
        int, typer.Option(help="Repeats sampled text for a fixed --gamma; auto depends on timing.")
    ] = DEFAULT.seed,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = DEFAULT.max_new_tokens,
    dtype: Annotated[Dtype, typer.Option(help="auto: bf16 where the machine computes in it.")] = DEFAULT.dtype,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = DEFAULT.device,
    engine: Annotated[
        EngineName, typer.Option(help="auto: triton on a GPU, compiled on a CPU, where they can run.")
    ] = DEFAULT.engine,
    target: Annotated[str, typer.Option(help="Folder, hub name, or pocket.")] = DEFAULT.target,
    drafter: Annotated[str, typer.Option(help="Folder, hub name, or pocket.")] = DEFAULT.drafter,
    baseline: Annotated[
        BaselineMode, typer.Option(help="Measure plain decoding on some rounds, on all, or not.")
    ] = DEFAULT.baseline,
    check: Annotated[bool, typer.Option("--check", help="Compare every token with plain decoding.")] = False,
    trim: Annotated[Trim | None, typer.Option(help="Shorten a prompt over the context: keep head and tail.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the tokenizer's chat template.")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write on from a prompt, faster, with the text the target would write alone."""
    options = DecodeOptions(
        target=target,
        drafter=drafter,
        budget=parse_budget(budget),
        gamma=parse_gamma(gamma),
        select=str(select),
        positions=str(positions),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        max_new_tokens=max_new_tokens,
        dtype=str(dtype),
        device=device,
        engine=str(engine),
        baseline=str(baseline),
        check=check,
        trim=None if trim is None else str(trim),
        chat=chat,
        stop=tuple(stop or ()),
    )
    from bdcli.data.prompts import read_prompt
    from bdcli.results.store import Store

    text = read_prompt(prompt)
    store = Store(db)
    with status_line("loading torch"):
        from bdcli.decode.run import decode_run
    with DecodeProgress(show_text=not as_json) as progress:
        result = decode_run(store, options, prompt, text, progress=progress)
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        summary(result)
    if result["status"] == "interrupted":
        note(f"interrupted; what was written is kept as run {result['run_id']}")
        raise typer.Exit(INTERRUPTED)
    if result["output_equal"] is False:
        raise BdcliError("the text differs from plain decoding, so the run is invalid", "See bdcli doctor")


@app.command()
def report(
    ctx: Annotated[str | None, typer.Option(help="8k: within 12.5 % of 8192; 8192: exactly that.")] = None,
    budget: Annotated[str | None, typer.Option(help="A budget, or full.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Data set or prompt name.")] = None,
    method: Annotated[str | None, typer.Option(help="bd, full, official, ...")] = None,
    command: Annotated[str | None, typer.Option(help="decode, bench, ...")] = None,
    arm: Annotated[str | None, typer.Option(help="A bench arm by name.")] = None,
    experiment: Annotated[str | None, typer.Option(help="One bench sweep by its key.")] = None,
    best: Annotated[
        bool, typer.Option("--best", help="Of each data set, context, method and budget the fastest valid cell.")
    ] = False,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="Bench arms as rows, data sets and contexts as columns.")
    ] = False,
    status: Annotated[str | None, typer.Option(help="done, failed, interrupted or running.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Newest runs to show; 0 shows all.")] = 0,
    form: Annotated[Format, typer.Option("--format", help="How to print.")] = "table",
    run: Annotated[str | None, typer.Option(help="One distil or pretrain run: what it measured, step by step.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw acceptance and speedup to a .png, .svg or .pdf file.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write tables and pictures as one page that needs no other file.")
    ] = None,
    db: DbOption = None,
) -> None:
    """Show stored runs, or with --run the curves of one."""
    from bdcli.results import plots, query, tables
    from bdcli.results.store import Store

    if ctx is not None:
        parse_context(ctx)
    store = Store(db, readonly=True)
    if run is not None:
        evaluations, losses = store.evaluations(run), store.losses(run)
        if losses and plot is None:
            typer.echo(tables.loss_table(losses, str(form)))
            return
        if not evaluations:
            raise UserError(f"run {run} has no acceptance grid", "See bdcli report --command distill")
        if plot is not None:
            plots.plot_curves(evaluations, plot)
            note(f"wrote {plot}")
        typer.echo(tables.acceptance_table(evaluations, str(form)))
        return
    keep = query.Filter(ctx, budget, dataset, method, command, status, arm, experiment)
    runs = [each for each in store.runs() if keep(each)]
    runs = query.check_cells(runs[:limit] if limit else runs, store)
    for line in query.refusals(runs):
        note(line)
    if best:
        runs = query.best_cells(runs)
    if plot is not None:
        plots.plot(runs, plot)
        note(f"wrote {plot}")
    if html is not None:
        from bdcli.results.page import write_page

        write_page(runs, html)
        note(f"wrote {html}")
    if side_by_side:
        typer.echo(tables.markdown(*tables.side_by_side(runs)))
        return
    if not runs and form == "table":
        note(f"no run in {store.name} fits; make one with: bdcli decode PROMPT_FILE")
    if form == "table":
        print_table(query.arrange(runs)) if runs else None
    elif form == "markdown":
        typer.echo(tables.as_markdown(query.arrange(runs)))
    else:
        typer.echo(tables.as_json(runs) if form == "json" else tables.as_csv(runs))


@app.command()
def prompt(
    ctx: Annotated[str, typer.Option(help="Length in tokens: 4k or 4096.")] = "4k",
    source: Annotated[str, typer.Option(help="stdlib (Python's own sources) or a text file.")] = "stdlib",
    out: Annotated[Path | None, typer.Option(help="File to write; stdout without it.")] = None,
    target: Annotated[str, typer.Option(help="Model whose tokenizer counts.")] = DEFAULT.target,
) -> None:
    """Write a real prompt of exactly that many tokens."""
    from bdcli.data.prompts import cut_prompt, read_prompt, stdlib_text

    tokens = parse_context(ctx)
    text = stdlib_text() if source == "stdlib" else read_prompt(source)
    from bdcli.model.checkpoint import load_tokenizer, resolve

    piece = cut_prompt(load_tokenizer(resolve(target, "target")), text, tokens)
    if out is None:
        sys.stdout.write(piece)
        return
    try:
        out.write_text(piece, "utf-8", newline="")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}", "Give a path in an existing folder") from None
    note(f"wrote {out}: {tokens} tokens, {len(piece)} characters")


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a model with .bin weights.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
) -> None:
    """Write a .bin checkpoint as safetensors; files that hold more than tensors are refused."""
    with status_line("converting"):
        from bdcli.model.convert import convert as write_folder

        write_folder(model, out)
    typer.echo(out)


@app.command()
def doctor(db: DbOption = None, as_json: JsonOption = False) -> None:
    """Check this machine, the store and the pocket pair."""
    with status_line("checking"):
        from bdcli.cli.doctor import checks

        found = list(checks(db))
    if as_json:
        typer.echo(json.dumps({c.name: {"ok": c.ok, "detail": c.detail} for c in found}, ensure_ascii=False))
    else:
        for c in found:
            typer.echo(f"{'ok  ' if c.ok else 'FAIL'}  {c.name:12} {c.detail}")
    if not all(c.ok for c in found):
        raise typer.Exit(1)


app.command()(bench)
app.command()(training.prepare)
app.command()(training.pretrain)
app.command()(training.distill)


def main() -> None:
    """Entry point: every expected error is one line on stderr and an exit code."""
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, raise_interrupt)
    app.debug = False
    try:
        code = typer.main.get_command(app).main(standalone_mode=False)
    except BdcliError as error:
        if app.debug:
            raise
        note(f"error: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        note("interrupted")
        code = INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away; nothing to say, nowhere to say it
        code = 1
    except Exception as error:
        if app.debug:
            raise
        usage = hasattr(error, "format_message")  # click's own errors, whose module typer may vendor
        message = " ".join((error.format_message() if usage else f"{type(error).__name__}: {error}").split())
        note(
            f"error: {message}. " + ("See bdcli --help" if usage else "Run again with bdcli --debug for the traceback")
        )
        code = getattr(error, "exit_code", 1) if usage else 1
    sys.exit(code if isinstance(code, int) else 0)
