"""The schema moves up and down, and is what the code's tables say."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import inspect

import migrations
from api.database import make_engine
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
