"""The command `decode`: one prompt in, text and figures out. Heavy imports wait inside it."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import Annotated

import typer

from bdcli.base.console import note, status_line
from bdcli.base.errors import INTERRUPTED, BdcliError
from bdcli.base.streams import check_output, write_json
from bdcli.cli.flags import MODEL_HELP, DbOption, JsonOption
from bdcli.cli.output import DecodeProgress, show_summary, shown_first
from bdcli.config.decode import CHOICES, DecodeOptions, parse_budget, parse_gamma

DEFAULT = DecodeOptions()
Select, Positions, Dtype, EngineName, BaselineMode, Trim, SpecialTokens = (
    StrEnum(name.title(), list(CHOICES[name]))
    for name in ("select", "positions", "dtype", "engine", "baseline", "trim", "special_tokens")
)
Weights = StrEnum("Weights", list(CHOICES["weights"]))


def decode(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT_FILE", help="UTF-8 text file, or - for standard input.")],
    budget: Annotated[str, typer.Option(help="KV entries the drafter may hold per layer and head, or full.")] = "512",
    gamma: Annotated[str, typer.Option(help="Tokens drafted per round, or auto.")] = "auto",
    select: Annotated[Select, typer.Option(help="What the drafter keeps of the prompt.")] = DEFAULT.select,
    positions: Annotated[Positions, typer.Option(help="Places of kept keys: ranks, or true.")] = DEFAULT.positions,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = DEFAULT.temperature,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 is off.")] = DEFAULT.top_k,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to mass p.")] = DEFAULT.top_p,
    min_p: Annotated[float, typer.Option(help="Keep tokens at least so likely as p times the best.")] = DEFAULT.min_p,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens of prompt and text are made less likely; 1 is off.")
    ] = DEFAULT.repetition_penalty,
    generation_config: Annotated[
        bool, typer.Option("--generation-config", help="Sample as the target's generation_config.json; flags win.")
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Repeats sampled text for a fixed --gamma; auto depends on timing.")
    ] = DEFAULT.seed,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = DEFAULT.max_new_tokens,
    dtype: Annotated[Dtype, typer.Option(help="auto: bf16 where the machine computes in it.")] = DEFAULT.dtype,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = DEFAULT.device,
    engine: Annotated[
        EngineName,
        typer.Option(
            help="auto: triton on a GPU, compiled on a CPU, where they can run. transformers: a target of any family."
        ),
    ] = DEFAULT.engine,
    target: Annotated[str, typer.Option(help=MODEL_HELP)] = DEFAULT.target,
    drafter: Annotated[
        str | None,
        typer.Option(help="As --target, or self: the target itself, the default for a target you name."),
    ] = None,
    weights: Annotated[
        Weights, typer.Option(help="Of the target. auto: as stored; int8 and int4 change what the target is.")
    ] = DEFAULT.weights,
    draft_weights: Annotated[
        Weights, typer.Option(help="Of the drafter; they change acceptance only. auto: int4 for self, else as stored.")
    ] = DEFAULT.draft_weights,
    baseline: Annotated[
        BaselineMode, typer.Option(help="Measure plain decoding on some rounds, on all, or not.")
    ] = DEFAULT.baseline,
    check: Annotated[bool, typer.Option("--check", help="Compare every token with plain decoding.")] = False,
    trim: Annotated[Trim | None, typer.Option(help="Shorten a prompt over the context: keep head and tail.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the tokenizer's chat template.")] = False,
    special_tokens: Annotated[
        SpecialTokens, typer.Option(help="Special tokens that the prompt spells: tokens, or text.")
    ] = DEFAULT.special_tokens,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt. The output is exactly what the target alone would produce."""
    options = DecodeOptions(
        target=target,
        drafter=drafter,
        weights=str(weights),
        draft_weights=str(draft_weights),
        budget=parse_budget(budget),
        gamma=parse_gamma(gamma),
        select=str(select),
        positions=str(positions),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_new_tokens=max_new_tokens,
        dtype=str(dtype),
        device=device,
        engine=str(engine),
        baseline=str(baseline),
        check=check,
        trim=None if trim is None else str(trim),
        chat=chat,
        special_tokens=str(special_tokens),
        stop=tuple(stop or ()),
    )
    if generation_config:
        options = with_generation_config(context, options)
    from bdcli.data.prompts import read_prompt
    from bdcli.results.store import Store

    text = read_prompt(prompt)
    store = Store(db)
    with status_line("loading torch"):
        from bdcli.decode.run import decode_run
    show = write_json if as_json else show_summary
    with shown_first(show), DecodeProgress(show_text=not as_json) as progress:
        result = decode_run(store, options, prompt, text, progress=progress)
    show(result)
    if result["status"] == "interrupted":
        check_output(f"What was generated is kept as run {result['run_id']}")
        note(f"interrupted; what was written is kept as run {result['run_id']}")
        raise typer.Exit(INTERRUPTED)
    if result["output_equal"] is False:
        raise BdcliError("the text differs from plain decoding, so the run is invalid", "See bdcli doctor")


def with_generation_config(context: typer.Context, options: DecodeOptions) -> DecodeOptions:
    """`options` with what the target's generation_config.json says of sampling, except where a flag was given."""
    from bdcli.model.generation import sampling_settings
    from bdcli.model.hub import resolve

    found = sampling_settings(resolve(options.target, "target"))
    used = {name: value for name, value in found.items() if context.get_parameter_source(name).name != "COMMANDLINE"}
    resolved = replace(options, **used)  # refuses bad values before anything is said
    listed = ", ".join(f"{name} {value}" for name, value in used.items()) or "nothing that a flag does not say"
    note(f"from generation_config.json: {listed}")
    return resolved
