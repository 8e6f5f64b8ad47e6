"""Runs that leave a row: start one, finish it whatever happens, hand the result back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from bdcli.base.files import digest
from bdcli.config.decode import DecodeOptions
from bdcli.decode.session import Listener, Pair, decode, drafter_view, load_pair, prompt_ids
from bdcli.results.store import Figures, Prompt, Run, Store


def decode_run(
    store: Store,
    options: DecodeOptions,
    source: str,
    text: str,
    *,
    pair: Pair | None = None,
    on_text: Callable[[str], None] = lambda _text: None,
    meter: Callable[[], AbstractContextManager] = nullcontext,
    say: Callable[[str], None] = lambda _line: None,
) -> dict:
    """Decode `text` (read from `source`) and store the run; returns the contract's fields with run_id.

    Bad input raises before a row is written; after that the row ends as done, failed or interrupted. `pair` spares
    loading the models anew; `meter()` opens a progress display and hands out progress(who, done, total), or None.
    """
    pair = pair or load_pair(options, say)
    ids = prompt_ids(pair, options, text)
    drafter_view(options, len(ids))  # refuses a budget that is too small
    dataset = "stdin" if source == "-" else Path(source).stem
    known = {"dataset": dataset, "method": method_name(options), "target": pair.names[0], "drafter": pair.names[1]}
    run_id = store.begin("decode", options.as_dict(), context=len(ids), **known)
    with recorded(store, run_id), meter() as progress:
        result = decode(pair, options, ids, Listener(on_text, progress, say))
    figures = {name: result[name] for name in Figures.model_fields}
    columns = {name: value for name, value in result.items() if name in Run.model_fields and name != "status"}
    prompt = Prompt(
        run_id=run_id,
        source=source,
        sha256=digest(text.encode()),
        text=result["text"],
        tokens=result["tokens"],
        rounds=result["rounds"],
        **figures,
    )
    status, error = result["status"], None
    if result["output_equal"] is False:
        status, error = "failed", "the text differs from plain decoding"
    store.finish(run_id, status, [prompt], error, **columns)
    return {"run_id": run_id, **result}


def method_name(options: DecodeOptions) -> str:
    """`full` for a full-cache drafter, `official` for the paper's selection, else `bd`."""
    if options.budget is None:
        return "full"
    return "official" if options.select == "official" else "bd"


@contextmanager
def recorded(store: Store, run_id: str) -> Iterator[None]:
    """A run that raises ends as failed, or interrupted, with the reason in its row."""
    try:
        yield
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        store.finish(run_id, status, error=f"{type(error).__name__}: {error}")
        raise
