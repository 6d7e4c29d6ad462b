"""Whether a server is ready, and what it says where it is not."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

import migrations
from api.database import make_engine
from api.main import create_app
from api.probes import Probe
from api.readiness import Readiness
from api.settings import Settings
from api.store.factory import open_store
from tests.api.conftest import Server
from tests.api.test_errors import assert_problem


def refused(server: Server) -> dict[str, Any]:
    """What an unready server answers, and still it lives."""
    assert server.http.get("/livez").json() == {"status": "alive"}
    answer = server.http.get("/readyz")
    code = answer.json()["code"]
    return assert_problem(answer, 503, code)


def test_a_ready_server_says_what_it_asked(server: Server) -> None:
    server.http.headers.pop("Authorization")
    ready = server.http.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["status"] == "ready"
    checks = {check["name"]: (check["status"], check["message"]) for check in ready.json()["checks"]}
    head = migrations.head()
    assert checks == {"database": ("ok", f"The schema is {head}."), "store": ("ok", "The store answers.")}


@pytest.mark.parametrize("revision", ["0004", "base"])
def test_an_older_schema_is_refused(server: Server, revision: str) -> None:
    migrations.downgrade(server.settings.database_url, revision)
    problem = refused(server)
    assert (problem["code"], problem["hint"]) == ("schema_stale", "Run `bitmill db upgrade`.")
    assert str(migrations.head()) in problem["detail"]
    assert ("0004" if revision == "0004" else "no schema") in problem["detail"]
    migrations.upgrade(server.settings.database_url)
    assert server.http.get("/readyz").status_code == 200


def test_a_newer_schema_is_refused(server: Server) -> None:
    with server.database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    problem = refused(server)
    assert problem["code"] == "schema_newer"
    assert "9999" in problem["detail"]
    assert str(migrations.head()) in problem["detail"]
    assert "upgrade`" not in problem["hint"]


def test_everything_that_is_wrong_is_said_at_once(server: Server) -> None:
    migrations.downgrade(server.settings.database_url, "0004")
    shutil.rmtree(server.settings.data_dir / "artifacts")
    problem = refused(server)
    assert [each["code"] for each in problem["errors"]] == ["schema_stale", "store_unavailable"]
    assert all(each["hint"] for each in problem["errors"])


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_without_its_broker_a_server_is_ready_and_says_so(settings: Settings) -> None:
    away = settings.model_copy(update={"broker_url": "redis://127.0.0.1:9/0"})
    with TestClient(create_app(away)) as http:
        ready = http.get("/readyz")
    assert ready.status_code == 200
    (broker,) = [check for check in ready.json()["checks"] if check["name"] == "broker"]
    assert (broker["status"], broker["code"]) == ("warning", "broker_unavailable")
    assert "sweep" in broker["hint"]


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_a_database_that_says_nothing_is_waited_for_no_longer_than_the_limit(
    tmp_path: Path, silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.readiness.CHECK_SECONDS", 0.2)
    settings = Settings(data_dir=tmp_path, database_url=f"postgresql://bitmill@127.0.0.1:{silent}/bitmill")
    engine = make_engine(settings.database_url)
    readiness = Readiness(settings, engine, open_store(settings.store_url))
    started = time.monotonic()
    for _ in range(3):
        database, store = asyncio.run(readiness.examine())
        assert (database.status, database.code) == ("failed", "database_unavailable")
        assert "0.2 seconds" in database.message
        assert store.status == "ok"
    assert time.monotonic() - started < 2
    asking = [thread for thread in threading.enumerate() if thread.name == "database"]
    assert len(asking) == 1


def test_a_question_is_asked_once_for_all_who_wait_and_again_afterwards() -> None:
    asked: list[int] = []
    go_on = threading.Event()

    def ask() -> int:
        asked.append(1)
        go_on.wait()
        return len(asked)

    probe = Probe("test", ask)
    waiting = [probe.begin() for _ in range(3)]
    go_on.set()
    assert [answer.result(5) for answer in waiting] == [1, 1, 1]
    assert probe.begin().result(5) == 2
