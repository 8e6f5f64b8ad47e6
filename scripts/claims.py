"""Does acceptance hold under a small budget and a long context? Real decoding at a fixed γ, outside loops.

    python scripts/claims.py run --on books=FOLDER --on qmsum=FILE.jsonl --on lwm=FILE.jsonl --naive DIR
    python scripts/claims.py show runs/claims

`naive` is a drafter trained on its full cache only. The same command resumes after a stop, and one with a naive
drafter, a budget or a temperature more adds its texts. `bdcli.bench.claims` says how the figures are made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bdcli.base.console import ConsoleProgress, run_script
from bdcli.bench.claims import read_measurement, report
from bdcli.bench.claims_texts import ClaimsSettings, Measurement
from bdcli.config.decode import parse_budget, parse_context

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
FOLDER, ENOUGH_TOKENS = Path("runs/claims"), 5000


@app.command()
def run(
    on: Annotated[list[str], typer.Option(help="Held-out text, NAME=PLACE; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Folder of the measurement.")] = FOLDER,
    target: Annotated[str, typer.Option(help="Folder, hub name, or pocket.")] = "pocket",
    drafter: Annotated[str, typer.Option(help="The drafter that is measured.")] = "pocket",
    naive: Annotated[str | None, typer.Option(help="One trained on its full cache only.")] = None,
    ctx: Annotated[str, typer.Option(help="Contexts.")] = "4k,8k,16k",
    budgets: Annotated[str, typer.Option(help="The smallest is compared with full and the largest.")] = "256,2048,full",
    temperatures: Annotated[str, typer.Option(help="0 is greedy.")] = "0,1",
    gamma: Annotated[int, typer.Option(help="Tokens drafted a round.")] = 5,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated after each prompt.")] = 256,
    enough: Annotated[int, typer.Option(help="Tokens outside loops that each cell needs.")] = ENOUGH_TOKENS,
    prompts: Annotated[int, typer.Option(help="Most prompts of a data set.")] = 200,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Processes that decode side by side.")] = 1,
) -> None:
    """Measure what is missing, then show it."""
    settings = ClaimsSettings(
        contexts=tuple(map(parse_context, ctx.split(","))),
        budgets=tuple(parse_budget(b) or "full" for b in budgets.split(",")),
        temperatures=tuple(map(float, temperatures.split(","))),
        gamma=gamma,
        new_tokens=new_tokens,
        prompts=prompts,
        dtype=dtype,
    )
    models = {"target": target, "drafter": drafter} | ({"naive": naive} if naive else {})
    with ConsoleProgress(resumable=True) as progress:
        measurement = Measurement(out, settings, on, models, jobs, progress)
        measurement.measure_worth()
        measurement.run(enough)
    show(out, enough)


@app.command()
def show(
    out: Annotated[Path, typer.Argument(help="Folder of the measurement.")] = FOLDER,
    enough: Annotated[int, typer.Option(help="Tokens outside loops that each cell needs.")] = ENOUGH_TOKENS,
) -> None:
    """Print what is measured so far."""
    typer.echo(report(*read_measurement(out), enough))


if __name__ == "__main__":
    run_script(app)
