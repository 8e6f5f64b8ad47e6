"""Runs that leave a row: start one, finish it whatever happens, return the result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bdcli.base.files import digest
from bdcli.base.progress import SILENT, Progress
from bdcli.config.decode import DecodeOptions
from bdcli.decode.session import Session
from bdcli.results.schema import Prompt
from bdcli.results.store import Store


def decode_run(
    store: Store,
    options: DecodeOptions,
    source: str,
    text: str,
    *,
    session: Session | None = None,
    progress: Progress = SILENT,
) -> dict:
    """Decode `text` (read from `source`) and store the run; returns the contract's fields with run_id.

    Bad input raises before a row is written; after that the row ends as done, failed or interrupted. `session` saves
    loading the models again.
    """
    session = session or Session.open(options, progress)
    ids = session.prompt_ids(text, progress)
    dataset = "stdin" if source == "-" else Path(source).stem
    names = dict(zip(("target", "drafter"), session.pair.names))
    known = {"dataset": dataset, "method": session.selection.method, **names}
    run_id = store.begin("decode", options.as_dict(), context=len(ids), **known)
    with recorded(store, run_id):
        result = session.decode(ids, progress)
    status, error = result.status, None
    if result.figures.output_equal is False:
        status, error = "failed", "the text differs from plain decoding"
    row = Prompt(
        run_id=run_id,
        source=source,
        sha256=digest(text.encode()),
        text=result.text,
        tokens=result.tokens,
        rounds=result.rounds,
        **result.figures.model_dump(),
    )
    store.finish(run_id, status, [row], error, **result.columns())
    return {"run_id": run_id, **result.as_dict()}


@contextmanager
def recorded(store: Store, run_id: str) -> Iterator[None]:
    """A run that raises ends as failed, or interrupted, with the reason in its row."""
    try:
        yield
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        store.finish(run_id, status, error=f"{type(error).__name__}: {error}")
        raise
