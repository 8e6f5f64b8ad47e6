"""Named changes of the store's schema, applied in order to stores of older versions.

To add a column: add the field in `schema.py` and append a migration here,

    ("weights of the models", lambda connection: add_columns(connection, "run", {String: "weights"})),

and never rename, reorder or edit an entry: a store records them by name. A migration also runs on a new store, whose
tables already have every column of `schema.py`, so it changes only what is not yet as it should be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from sqlalchemy import (
    JSON,
    Boolean,
    Connection,
    DateTime,
    Engine,
    Float,
    Integer,
    String,
    insert,
    inspect,
    select,
    text,
)
from sqlalchemy.schema import CreateIndex, CreateTable
from sqlmodel import SQLModel

from bdcli.results.schema import Migration

# Figures of runs and prompts when migrations were introduced (commit 7740430).
FIGURES = {
    Integer: "context new_tokens drafted accepted max_drafter_entries drafter_kv_bytes target_kv_bytes"
    " peak_memory_bytes ties",
    Float: "acceptance_rate acceptance_rate_no_loops mean_accepted_length ttft_s tokens_per_second"
    " ar_tokens_per_second speedup loop_rate",
    Boolean: "output_equal",
    String: "finish_reason",
}
RUN = {
    Integer: "prompts top_k seed pid",
    Float: "temperature top_p acceptance_low acceptance_high speedup_low speedup_high speedup_no_loops ar_variation"
    " process_started",
    Boolean: "valid",
    String: "error method dataset target drafter device dtype attention budget gamma select positions experiment arm"
    " ar_run_id invalid_reason seal machine host git_revision",
    DateTime: "finished_at",
    JSON: "versions config",
}
PROMPT = {Integer: "index", String: "source sha256 text error", JSON: "tokens rounds"}
EVALUATION = {Float: "acceptance_rate_no_loops"}


def baseline(connection: Connection) -> None:
    """Bring a store of any version before migrations, or a new one, to the tables of commit 7740430."""
    for table in SQLModel.metadata.sorted_tables:
        connection.execute(CreateTable(table, if_not_exists=True))
    for table, groups in {"run": (FIGURES, RUN), "prompt": (FIGURES, PROMPT), "evaluation": (EVALUATION,)}.items():
        for columns in groups:
            add_columns(connection, table, columns)
    for table in SQLModel.metadata.sorted_tables:
        present = _columns(connection, table.name)
        for index in table.indexes:
            if present.issuperset(column.name for column in index.columns):
                connection.execute(CreateIndex(index, if_not_exists=True))


def add_columns(connection: Connection, table: str, columns: dict[type, str]) -> None:
    """Add the columns, given as {type: names}, that `table` lacks. They are null in the rows it has."""
    present = _columns(connection, table)
    for kind, names in columns.items():
        sql_type = kind().compile(connection.dialect)
        for name in names.split():
            if name not in present:
                connection.execute(text(f'ALTER TABLE "{table}" ADD COLUMN "{name}" {sql_type}'))


MIGRATIONS: list[tuple[str, Callable[[Connection], None]]] = [
    ("baseline", baseline),
    ("weights of the models", lambda connection: add_columns(connection, "run", {String: "weights draft_weights"})),
    ("sampling settings", lambda connection: add_columns(connection, "run", {Float: "min_p repetition_penalty"})),
]


def pending(engine: Engine) -> tuple[list[str], list[str]]:
    """(names of the migrations that this store lacks, names it has that this version does not know)."""
    known = [name for name, _ in MIGRATIONS]
    applied: list[str] = []
    if inspect(engine).has_table(Migration.__tablename__):
        with engine.connect() as connection:
            applied = list(connection.scalars(select(Migration.name)))
    return [name for name in known if name not in applied], [name for name in applied if name not in known]


def apply(engine: Engine, names: list[str]) -> None:
    """Apply these migrations, a transaction each. Several processes may do this at once."""
    for name, change in MIGRATIONS:
        if name not in names:
            continue
        with _transaction(engine) as connection:
            connection.execute(CreateTable(Migration.__table__, if_not_exists=True))
            if connection.scalar(select(Migration.name).where(Migration.name == name)) is not None:
                continue  # another process was faster
            change(connection)
            connection.execute(insert(Migration).values(name=name, applied_at=datetime.now(UTC)))


def _columns(connection: Connection, table: str) -> set[str]:
    return {column["name"] for column in inspect(connection).get_columns(table)}


@contextmanager
def _transaction(engine: Engine) -> Iterator[Connection]:
    """A transaction that also covers changes of the schema.

    Python's sqlite3 opens one for data only, so here SQLite is asked directly, for the write lock at once.
    """
    if engine.dialect.name != "sqlite":
        with engine.begin() as connection:
            yield connection
        return
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        try:
            yield connection
        except BaseException:
            connection.exec_driver_sql("ROLLBACK")
            raise
        connection.exec_driver_sql("COMMIT")
