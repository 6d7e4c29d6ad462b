"""Sessions on SQLite: one writer at a time, readers undisturbed, one clock in UTC."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from psycopg.pq import TransactionStatus
from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session

from api import database as clock
from api.database import Database
from api.projects.models import ApiKey, Project


def add_project(database: Database, name: str, created_at: datetime | None = None) -> None:
    with database.write() as session:
        session.add(Project(id=name, name=name, created_at=created_at or clock.now(session)))


def counted_together(database: Database, begin: Callable[[Session], None]) -> str:
    """What four threads count to, ten steps each, in transactions that read and then write."""
    add_project(database, "0")

    def count() -> None:
        for _ in range(10):
            with database.write() as session:
                begin(session)
                project = session.scalars(select(Project)).one()
                project.name = str(int(project.name) + 1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as session:
        return session.scalars(select(Project.name)).one()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_pragmas(database: Database) -> None:
    with database.read() as session:
        found = {
            name: session.execute(text(f"PRAGMA {name}")).scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 5000}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_write_that_reads_first_waits_for_the_other_writer(database: Database) -> None:
    """With a plain BEGIN, both would read the old number and one would fail or be lost."""
    assert counted_together(database, lambda _session: None) == "40"


def test_readers_see_one_snapshot_and_block_nobody(database: Database) -> None:
    add_project(database, "a")
    with database.read() as reader:
        assert len(reader.scalars(select(Project.id)).all()) == 1
        started = time.monotonic()
        add_project(database, "b")
        assert time.monotonic() - started < 4  # the busy timeout is 5 seconds
        assert len(reader.scalars(select(Project.id)).all()) == 1
    with database.read() as reader:
        assert len(reader.scalars(select(Project.id)).all()) == 2


def test_a_session_that_has_said_nothing_holds_no_lock(database: Database) -> None:
    with database.write():
        add_project(database, "a")


def test_a_failed_block_leaves_nothing(database: Database) -> None:
    def add_and_break() -> None:
        with database.write() as session:
            session.add(Project(id="a", name="a", created_at=clock.now(session)))
            session.flush()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        add_and_break()
    with database.read() as session:
        assert session.scalars(select(Project.id)).all() == []


def test_foreign_keys_are_held(database: Database) -> None:
    def add_orphan() -> None:
        with database.write() as session:
            now = clock.now(session)
            session.add(ApiKey(id="k", project_id="none", name="", digest="", scopes=[], created_at=now))

    with pytest.raises(IntegrityError):
        add_orphan()


def test_times_are_utc_and_come_back_as_they_went(database: Database) -> None:
    moment = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=5)))
    add_project(database, "a", moment)
    with database.read() as session:
        back = session.scalars(select(Project.created_at)).one()
        assert back == moment
        assert back.tzinfo == UTC
        assert abs(clock.now(session) - datetime.now(UTC)) < timedelta(seconds=5)


def test_stored_times_compare_as_times(database: Database) -> None:
    """SQLite compares text: every time must be stored with the same digits."""
    with database.read() as session:
        now = clock.now(session)
    add_project(database, "past", now - timedelta(microseconds=1))
    add_project(database, "same", now)
    add_project(database, "future", now + timedelta(microseconds=1))
    with database.read() as session:
        assert session.scalars(select(Project.id).where(Project.created_at == now)).all() == ["same"]
        assert session.scalars(select(Project.id).where(Project.created_at < now)).all() == ["past"]


def test_memory_databases_are_refused() -> None:
    with pytest.raises(ValueError, match="SQLite needs a file"):
        Database("sqlite://")


def test_an_unwritable_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((NotADirectoryError, FileExistsError, OperationalError)):
        Database(f"sqlite:///{tmp_path / 'file' / 'bitmill.db'}")


def test_one_transaction_at_a_time_has_a_name(database: Database) -> None:
    """Both would read the old number, without a lock on PostgreSQL."""
    assert counted_together(database, lambda session: clock.lock(session, "projects")) == "40"


def test_who_only_looks_sees_what_others_write_meanwhile(database: Database) -> None:
    with database.look() as session:
        assert session.scalars(select(Project.id)).all() == []
        add_project(database, "a")
        session.rollback()
        assert session.scalars(select(Project.id)).all() == ["a"]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_look_is_no_transaction(database: Database) -> None:
    with database.look() as session:
        first, second = (session.scalar(select(func.pg_current_xact_id())) for _ in range(2))
        assert first != second
        assert (
            session.connection().connection.driver_connection.info.transaction_status
            == TransactionStatus.IDLE
        )
    with database.read() as session:
        assert session.scalar(text("SHOW transaction_isolation")) == "repeatable read"
    with database.write() as session:
        assert session.scalar(text("SHOW transaction_isolation")) == "read committed"
        first, second = (session.scalar(select(func.pg_current_xact_id())) for _ in range(2))
        assert first == second


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_connection_that_lay_idle_is_asked_whether_it_stands(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = text(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with database.look() as one, database.look() as two:
        one.execute(select(1))
        two.execute(select(1))
    outside = Database(database.engine.url.render_as_string(hide_password=False))
    with outside.look() as session:
        session.execute(others)
    outside.close()
    monkeypatch.setattr(clock, "_FRESH_SECONDS", 0)
    with database.look() as session:
        assert session.scalar(select(1)) == 1
    monkeypatch.undo()
    with database.look() as one, database.look() as two:  # the others of its time went with it
        assert one.scalar(select(1)) == two.scalar(select(1)) == 1
