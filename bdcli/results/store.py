"""The store of all runs: SQLite through SQLModel. No torch here.

A row is written when computing starts and completed when it ends. A run whose process is gone without completing its
row (kill -9, power) is marked interrupted by whoever opens the store next.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Engine, StaticPool, event
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError
from sqlmodel import Session, SQLModel, create_engine, select

from bdcli.base.errors import BdcliError, UserError
from bdcli.base.provenance import git_revision, machine, versions
from bdcli.base.streams import printable
from bdcli.results import migrations
from bdcli.results.location import file_of, file_url, is_writable, locate, read_only_url
from bdcli.results.processes import is_alive, this_process
from bdcli.results.schema import Evaluation, Loss, Prompt, Run

PATIENCE_S = 30  # how long one process waits for another that holds the store


class Store:
    """Open with `Store(where)`; `where` is a path, a SQLAlchemy URL, or None for BDCLI_DB or the user's data folder.

    A store of an older version is migrated first. Raises UserError when the store cannot be used, among others where a
    newer version wrote it. `readonly` needs no write permission, creates nothing and migrates a copy in memory.
    `preview` works on a copy in memory, empty where no store exists: nothing is written anywhere. A server's store is
    read in place then, if its tables are current, and else taken as empty.
    """

    def __init__(self, where: str | None = None, readonly: bool = False, preview: bool = False):
        self.path, self.name = locate(where)
        self.readonly = False
        with self._explained(UserError):
            self._open(where, readonly, preview)

    def _open(self, where: str | None, readonly: bool, preview: bool) -> None:
        exists = self.path is not None and self.path.exists()
        self.readonly = readonly and exists and not is_writable(self.path)
        place = self.name
        if readonly and self.path is not None and not exists:
            if where:
                raise UserError(f"there is no store at {where}", "Runs are stored by: bdcli decode PROMPT_FILE")
            place, self.path = "sqlite://", None  # nothing was ever stored: show an empty one, make no file
        if preview and self.path is None:
            self.path = file_of(place)
        self._engine = _in_memory(self.path) if preview and self.path is not None else self._connect(place)
        if preview and self.path is None:
            if not migrations.pending(self._engine)[0]:
                return
            self._engine = self._connect("sqlite://")
        self._migrate(in_copy=readonly and self.path is not None)
        if not self.readonly:
            self._mark_interrupted()

    def _connect(self, place: str) -> Engine:
        url = place if self.path is None else (read_only_url if self.readonly else file_url)(self.path)
        engine = create_engine(url, json_serializer=_compact)
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", self._prepare_connection)
        return engine

    def _prepare_connection(self, connection, _record) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {1000 * PATIENCE_S}")
        if not self.readonly:
            _switch_to_wal(cursor)
        cursor.close()

    def _migrate(self, in_copy: bool) -> None:
        missing, unknown = migrations.pending(self._engine)
        if unknown:
            raise UserError(
                f"store {self.name} was written by a newer bdcli (migration {unknown[0]!r})",
                "Update bdcli, or use another: --db runs.db",
            )
        if missing and in_copy:
            self._engine.dispose()
            self._engine = _in_memory(self.path)
        migrations.apply(self._engine, missing)

    def _mark_interrupted(self) -> None:
        with Session(self._engine) as session:
            for run in session.exec(select(Run).where(Run.status == "running")):
                if is_alive(run) is False:
                    run.status = "interrupted"
                    session.add(run)
            session.commit()

    @contextmanager
    def _explained(self, kind: type[BdcliError] = BdcliError) -> Iterator[None]:
        """Errors of the store as one line with its name; `kind` is UserError where nothing was computed yet."""
        hint = "Use another: --db runs.db"
        try:
            yield
        except (ArgumentError, NoSuchModuleError) as error:
            raise UserError(f"store {self.name}: {error}", "Give a file or a SQLAlchemy URL") from None
        except DatabaseError as error:
            reason = str(error.orig)
            if "not a database" in reason or "malformed" in reason:
                raise UserError(f"store {self.name} is not a SQLite file", hint) from None
            raise kind(f"store {self.name} cannot be used ({reason})", hint) from None
        except OSError as error:
            raise kind(f"store {self.name} cannot be used ({error.strerror})", hint) from None

    def begin(self, command: str, config: dict, **fields) -> str:
        """Write a row with status running; returns its run_id. `fields` win over what is known of this process."""
        now = datetime.now(UTC)
        run_id = f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        known = {"machine": machine(), "git_revision": git_revision(), "versions": versions(), **this_process()}
        fields = known | fields
        run = Run(run_id=run_id, started_at=now, command=command, status="running", config=config, **fields)
        with self._explained(UserError), Session(self._engine) as session:
            session.add(run)
            session.commit()
        return run_id

    def finish(self, run_id: str, status: str, prompts: list[Prompt] = (), error: str | None = None, **fields) -> None:
        """Complete a row. Unknown keys of `fields` are a programming error and raise."""
        with self._explained(), Session(self._engine) as session:
            run = session.get(Run, run_id)
            run.status, run.error, run.finished_at = status, error, datetime.now(UTC)
            _assign(run, fields)
            run.prompts = len(prompts)
            session.add(run)
            session.add_all(prompts)
            session.commit()

    def update(self, run_id: str, **fields) -> None:
        """Change columns of a row that is not complete yet. Unknown keys are a programming error and raise."""
        with self._explained(), Session(self._engine) as session:
            run = session.get(Run, run_id)
            _assign(run, fields)
            session.add(run)
            session.commit()

    def reopen(self, run_id: str) -> None:
        """Continue an interrupted row in this process."""
        self.update(run_id, status="running", finished_at=None, **this_process())

    def put_prompt(self, prompt: Prompt) -> None:
        """Add a prompt's row and give it its id, or change it when it has one."""
        with self._explained(), Session(self._engine) as session:
            kept = session.merge(prompt)
            session.commit()
            prompt.id = kept.id

    def add_measurements(self, rows: list[Evaluation] | list[Loss]) -> None:
        with self._explained(), Session(self._engine) as session:
            session.add_all(rows)
            session.commit()

    def losses(self, run_id: str) -> list[Loss]:
        with self._explained(), Session(self._engine) as session:
            return list(session.exec(select(Loss).where(Loss.run_id == run_id).order_by(Loss.step, Loss.id)))

    def evaluations(self, run_id: str) -> list[Evaluation]:
        with self._explained(), Session(self._engine) as session:
            chosen = select(Evaluation).where(Evaluation.run_id == run_id)
            return list(session.exec(chosen.order_by(Evaluation.step, Evaluation.id)))

    def runs(self, experiment: str | None = None) -> list[Run]:
        """All runs, or those of one experiment, newest first."""
        chosen = select(Run) if experiment is None else select(Run).where(Run.experiment == experiment)
        with self._explained(), Session(self._engine) as session:
            return list(session.exec(chosen.order_by(Run.started_at.desc(), Run.run_id.desc())))

    def prompts(self, run_id: str) -> list[Prompt]:
        with self._explained(), Session(self._engine) as session:
            return list(session.exec(select(Prompt).where(Prompt.run_id == run_id).order_by(Prompt.index, Prompt.id)))

    def close(self) -> None:
        """Drop the connections; SQLite then folds its write-ahead log into the file."""
        self._engine.dispose()


def _switch_to_wal(cursor) -> None:
    """SQLite changes the journal mode without waiting for other processes, whatever busy_timeout says; so wait here."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _in_memory(path: Path) -> Engine:
    """A store in memory with what the file at `path` holds, if there is one. Nothing is written to it or beside it.

    A write-ahead log is read with its lock, which exists then; a file without one is whole by itself.
    """
    engine = create_engine("sqlite://", poolclass=StaticPool, json_serializer=_compact)
    if path.is_file():
        log = path.with_name(path.name + "-wal")
        logged = is_writable(path) and log.exists() and log.stat().st_size > 0
        uri = f"{path.absolute().as_uri()}?mode=ro{'' if logged else '&immutable=1'}"
        with closing(sqlite3.connect(uri, uri=True)) as file, engine.connect() as memory:
            file.backup(memory.connection.driver_connection)
    return engine


def _assign(run: Run, fields: dict) -> None:
    for name, value in fields.items():
        if name not in Run.model_fields:
            raise AttributeError(f"the store has no column {name}")
        setattr(run, name, value)


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


@event.listens_for(SQLModel, "before_insert", propagate=True)
@event.listens_for(SQLModel, "before_update", propagate=True)
def _escape_names(_mapper: object, _connection: object, row: SQLModel) -> None:
    """Names of files may hold bytes that are no UTF-8, which a store cannot."""
    for column, value in dict(row).items():
        if isinstance(value, (str, dict)) and (clean := printable(value)) != value:
            setattr(row, column, clean)
