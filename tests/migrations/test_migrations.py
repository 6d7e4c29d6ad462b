"""The schema moves up and down, and is what the code's tables say."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    func,
    inspect,
    select,
)
from sqlalchemy.engine import Connection

import migrations
from api.database import for_writing, make_engine
from tests.support.postgres import new_database


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database."""
    if request.param == "postgresql":
        with new_database(request.getfixturevalue("postgres"), template="template1") as url:
            yield url
    else:
        yield f"sqlite:///{tmp_path / 'a folder' / 'bitmill.db'}"


def tables(url: str) -> set[str]:
    engine = make_engine(url)
    names = set(inspect(engine).get_table_names()) - {"alembic_version"}
    engine.dispose()
    return names


def test_up_down_up(url: str) -> None:
    migrations.upgrade(url)
    assert "jobs" in tables(url)
    migrations.downgrade(url, "base")
    assert tables(url) == set()
    migrations.upgrade(url)
    engine = make_engine(url)
    assert migrations.current(engine) == migrations.head()
    engine.dispose()


def test_no_table_differs_from_the_code(url: str) -> None:
    migrations.upgrade(url)
    migrations.check(url)


def test_the_claim_index_is_descending_in_priority(url: str) -> None:
    migrations.upgrade(url)
    engine = make_engine(url)
    table = (
        ("pg_indexes", "indexdef", "indexname") if "postgresql" in url else ("sqlite_master", "sql", "name")
    )
    catalogue, definition, name = table
    with engine.connect() as connection:
        query = f"SELECT {definition} FROM {catalogue} WHERE {name} = 'ix_jobs_claim'"
        sql = connection.exec_driver_sql(query).scalar_one()
    engine.dispose()
    assert "priority DESC" in sql


def test_processes_upgrade_at_once(url: str) -> None:
    code = f"import migrations; migrations.upgrade({url!r})"
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    migrations.check(url)


def test_jobs_that_were_planned_alike_share_a_plan(url: str) -> None:
    migrations.upgrade(url, "0009")
    engine = for_writing(make_engine(url))
    plans = [{"layers": 2, "calibration": {"seed": seed, "packing": True}} for seed in range(3)]
    plans += [{"layers": 2, "calibration": None}, {"layers": 3, "calibration": None}]
    with engine.begin() as connection:
        insert(connection, "projects", id="p", name="p")
        for number, plan in enumerate(plans):
            insert(connection, "jobs", id=f"job{number}", project_id="p", plan=plan)
    migrations.upgrade(url)
    with engine.connect() as connection:
        jobs, shared = (Table(name, MetaData(), autoload_with=connection) for name in ("jobs", "plans"))
        joined = select(shared).join(jobs, jobs.c.plan_id == shared.c.id).order_by(jobs.c.id)
        rows = connection.execute(joined).all()
        assert connection.scalar(select(func.count()).select_from(shared)) == 3
    alike = {"layers": 2, "calibration": {"packing": True}}
    assert [json.loads(row.document) for row in rows] == [alike, alike, alike, *plans[3:]]
    assert all(row.id == hashlib.sha256(row.document.encode()).hexdigest() for row in rows)
    migrations.downgrade(url, "0009")
    with engine.connect() as connection:
        jobs = Table("jobs", MetaData(), autoload_with=connection)
        back = connection.scalars(select(jobs.c.plan).order_by(jobs.c.id)).all()
    assert back == [json.loads(row.document) for row in rows]
    engine.dispose()


def insert(connection: Connection, into: str, **values: Any) -> None:
    """A row that has what it must have, whatever that is."""
    table = Table(into, MetaData(), autoload_with=connection)
    needed = {
        column.name: _SOME[type(column.type.as_generic())]
        for column in table.columns
        if not column.nullable and column.server_default is None
    }
    connection.execute(table.insert().values({**needed, **values}))


_SOME: dict[type, Any] = {
    String: "x", Text: "x", Integer: 1, BigInteger: 1, JSON: {}, DateTime: datetime(2026, 1, 1, tzinfo=UTC),
}  # fmt: skip
