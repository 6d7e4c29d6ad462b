"""The database: engine, sessions, and the one clock that every host agrees on.

Writers on SQLite begin with BEGIN IMMEDIATE, so that a transaction that read and then writes never fails
half-way, and take turns (write_queue.py). On PostgreSQL they run beside each other, and lock the rows or the
names that they decide by. Readers see one snapshot on both. A single query needs no transaction.

A transaction ends in the function that opened it, `with database.write() as session:` (docs/adr/0033). None
is open while a request waits for a thread, the network or a store.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from sqlalchemy import JSON, DateTime, MetaData, Row, create_engine, event, func, make_url, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Connection, Dialect, Engine
from sqlalchemy.exc import DBAPIError, InterfaceError, InvalidatePoolError, OperationalError, TimeoutError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

from api.private import make_file, make_folder
from api.write_queue import WriteQueue, write_queue

AWAY = (OperationalError, InterfaceError, TimeoutError)
"""Errors that are raised while the database does not answer. The transaction may have been committed all the
same, if only the answer was lost."""
BUSY_TIMEOUT_SECONDS = 5
"""How long SQLite waits for a writer in another process."""
WRITE_WAIT_SECONDS = 30.0
"""How long a writer on SQLite waits for the others in this process."""
_READING: dict[str, dict[str, Any]] = {
    "sqlite": {},
    "postgresql": {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True},
}
_WRITING: dict[str, dict[str, Any]] = {
    "sqlite": {"immediate": True},
    "postgresql": {"immediate": True, "isolation_level": "READ COMMITTED"},
}
_FRESH_SECONDS = 1.0
"""A connection that was used less than this ago is not pinged before it is used again."""
_POOL_SIZE = 40  # as many as FastAPI has threads for routes; connections above are opened for each use
_POOL_OVERFLOW = 20  # for plans and webhooks, which have threads of their own, and probes
_TURN = "write_queue"  # in a connection's info, while it has SQLite's write lock


class UTCDateTime(TypeDecorator[datetime]):
    """An aware datetime in UTC, with microseconds, on every database."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


JSONColumn = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


Columns = Row[*tuple[Any, ...]]
"""Columns by their names, of a row that was not made an object."""


class Base(DeclarativeBase):
    """Base of all tables. Constraint names are fixed, so that migrations can name them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UTCDateTime(),
        dict[str, Any]: JSONColumn,
        dict[str, str]: JSONColumn,
        list[str]: JSONColumn,
    }


class Now(FunctionElement[datetime]):
    """The database's clock as an SQL expression, for queries that ask for it beside other things."""

    type = UTCDateTime()
    inherit_cache = True


@compiles(Now)
def _now_default(_element: Now, _compiler: SQLCompiler, **_kw: Any) -> str:
    return "clock_timestamp()"


@compiles(Now, "sqlite")
def _now_sqlite(_element: Now, _compiler: SQLCompiler, **_kw: Any) -> str:
    return "strftime('%Y-%m-%d %H:%M:%f', 'now')"


def now(session: Session) -> datetime:
    """The database's clock, in UTC. Leases compare only times from here, so hosts' clocks do not matter."""
    return session.execute(select(Now())).scalar_one()


def lock(session: Session, name: str) -> None:
    """Take an advisory lock of that name until the transaction ends.

    For what has no row yet that could be locked. On SQLite there is one writer at a time anyway.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))


def reason(error: Exception) -> str:
    """The database's message, without the statement."""
    return str(error.orig if isinstance(error, DBAPIError) else error)


class Database:
    """Sessions on one database.

    A session of `read` or `write` is a transaction: it begins with its first statement, commits when the
    block ends and rolls back when the block raises. Objects stay readable after the block.
    """

    def __init__(self, url: str) -> None:
        self.engine = make_engine(url)
        reading = self.engine.execution_options(**_READING[self.engine.dialect.name])
        self._look = sessionmaker(self.engine, expire_on_commit=False)
        self._read = sessionmaker(reading, expire_on_commit=False)
        self._write = sessionmaker(for_writing(self.engine), expire_on_commit=False)

    @contextmanager
    def look(self) -> Iterator[Session]:
        """A session without a transaction, in autocommit: each statement reads for itself, and two may see
        different states. Saves two round trips to PostgreSQL."""
        with self._look() as session:
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that only reads, from one snapshot: the state at its first statement."""
        with self._read() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that writes; takes SQLite's write lock with its first statement."""
        with self._write.begin() as session:
            yield session

    def close(self) -> None:
        """Close all idle connections."""
        self.engine.dispose()


def make_engine(url: str) -> Engine:
    """An engine for that URL; for SQLite with the file's folder made and the pragmas set. On PostgreSQL each
    statement is its own transaction, unless options say otherwise.

    Raises:
        ValueError: the database is neither PostgreSQL nor a file of SQLite.
    """
    parts = make_url(url)
    if parts.get_backend_name() == "postgresql":
        url = parts.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
        engine = create_engine(
            url,
            pool_size=_POOL_SIZE,
            max_overflow=_POOL_OVERFLOW,
            isolation_level="AUTOCOMMIT",
            skip_autocommit_rollback=True,
        )
        event.listen(engine, "checkin", _note_use)
        event.listen(engine, "checkout", partial(_ping_if_idle, engine.dialect))
        return engine
    if parts.get_backend_name() != "sqlite":
        raise ValueError(f"Bitmill keeps its jobs in SQLite or PostgreSQL, not in {parts.get_backend_name()}")
    file = parts.database
    if not file or file == ":memory:":
        raise ValueError("SQLite needs a file: every connection to :memory: is a database of its own")
    make_folder(Path(file).parent)
    engine = create_engine(
        url,
        pool_size=_POOL_SIZE,
        max_overflow=_POOL_OVERFLOW,
        connect_args={"timeout": BUSY_TIMEOUT_SECONDS, "check_same_thread": False},
    )
    event.listen(engine, "do_connect", partial(_make_private, Path(file)))
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", partial(_begin_sqlite, write_queue(str(Path(file).resolve()))))
    event.listen(engine, "checkin", _end_turn)
    return engine


def for_writing(engine: Engine) -> Engine:
    """The engine, for transactions that write."""
    return engine.execution_options(**_WRITING[engine.dialect.name])


def _note_use(_connection: Any, record: ConnectionPoolEntry) -> None:
    record.info["used"] = time.monotonic()


def _ping_if_idle(dialect: Dialect, connection: Any, record: ConnectionPoolEntry, _proxy: Any) -> None:
    """Ping a connection that lay idle: the server may have been restarted meanwhile."""
    used = record.info.get("used")
    if used is None or time.monotonic() - used < _FRESH_SECONDS:
        return
    try:
        dialect.do_ping(connection)
    except dialect.loaded_dbapi.Error as error:
        raise InvalidatePoolError from error


def _make_private(file: Path, *_connecting: Any) -> None:
    """Before SQLite makes the file, with a mode for everybody. Its -wal and -shm get the mode of the file."""
    make_file(file)


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # the driver would begin transactions by itself, and too late
    _enter_wal(connection)
    connection.execute("PRAGMA synchronous=FULL").close()
    connection.execute("PRAGMA foreign_keys=ON").close()


def _enter_wal(connection: sqlite3.Connection) -> None:
    """WAL is a property of the file, set once. SQLite's busy timeout does not cover this: wait here."""
    give_up = time.monotonic() + BUSY_TIMEOUT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
            return
        except sqlite3.OperationalError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.01)


def _begin_sqlite(queue: WriteQueue, connection: Connection) -> None:
    if not connection.get_execution_options().get("immediate", False):
        connection.exec_driver_sql("BEGIN")
        return
    if _TURN not in connection.info:
        if not queue.acquire(WRITE_WAIT_SECONDS):
            raise TimeoutError(f"other writers took more than {WRITE_WAIT_SECONDS:g} seconds")
        connection.info[_TURN] = queue
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _end_turn(_connection: Any, record: ConnectionPoolEntry) -> None:
    """When a connection goes back to the pool, its transaction is committed or rolled back."""
    queue = record.info.pop(_TURN, None)
    if queue is not None:
        queue.release()
