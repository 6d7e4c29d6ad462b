"""What the API logs: one record a request, ids in all of them, and no secret in any."""

from __future__ import annotations

import json
import os
import pty
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from sqlalchemy import text

from api.observability import configure_logging
from api.security import new_key
from api.settings import Settings
from tests.api.conftest import Server
from tests.api.test_errors import JSON_TYPE
from tests.support.logs import Logged, own_logging


@pytest.fixture
def _own_logging() -> Iterator[None]:
    with own_logging():
        yield


def test_one_record_for_each_request(server: Server, logged: Logged) -> None:
    job = server.submit()["id"]
    answers = [
        server.http.get(f"/v1/jobs/{job}?wait=0&since=0", headers={"X-Request-ID": "mine"}),
        server.http.get("/v1/nothing"),
    ]
    found, missing = logged.records("request")[-2:]
    assert [found["request_id"], missing["request_id"]] == ["mine", answers[1].headers["X-Request-ID"]]
    assert (found["method"], found["route"], found["status"]) == ("GET", "/v1/jobs/{job_id}", 200)
    assert (missing["route"], missing["path"], missing["status"]) == (None, "/v1/nothing", 404)
    assert 0 < found["milliseconds"] < 10_000
    assert len(logged.records("request")) == 3


def test_records_within_a_request_name_it_and_what_it_is_about(server: Server, logged: Logged) -> None:
    answer = server.http.post("/v1/jobs", json=server.body(), headers={"X-Request-ID": "submit"})
    (accepted,) = logged.records("job_accepted")
    assert (accepted["request_id"], accepted["job_id"]) == ("submit", answer.json()["id"])
    batch = server.http.post("/v1/batches", json={"jobs": [server.body(), server.body(scheme="W5A16")]})
    (accepted,) = logged.records("batch_accepted")
    assert (accepted["batch_id"], accepted["accepted"], accepted["refused"]) == (batch.json()["id"], 1, 1)
    with server.database.write() as session:
        session.execute(text("UPDATE jobs SET status = 'no such status'"))
    for job in ("one", answer.json()["id"]):
        server.http.get(f"/v1/jobs/{job}/report", headers={"X-Request-ID": f"of-{job}"})
    (failed,) = logged.records("request_failed")
    assert (failed["request_id"], failed["job_id"]) == (f"of-{answer.json()['id']}", answer.json()["id"])
    assert [record["job_id"] for record in logged.records("request")[-2:]] == ["one", answer.json()["id"]]


def test_a_key_is_never_logged_wherever_it_is_sent(server: Server, logged: Logged) -> None:
    own, key = server.http.headers["Authorization"].removeprefix("Bearer "), new_key()
    http = server.http
    http.get("/v1/jobs", headers={"Authorization": f"Bearer {key}"})
    http.get("/v1/jobs", headers={"Authorization": key, "X-Request-ID": key, "Cookie": f"key={key}"})
    http.get(f"/v1/jobs?api_key={key}&model={key}")
    http.get(f"/v1/jobs/{key}/events")
    http.get(f"/{key}")
    http.post("/v1/jobs", json=server.body(name=key, labels={"key": key}))
    http.post("/v1/jobs", json={"model": key, "scheme": key, key: key})
    http.post("/v1/jobs", content=f'{{"{key}', headers=JSON_TYPE)
    with server.database.write() as session:
        session.execute(text("UPDATE jobs SET status = 'no such status'"))
    http.get("/v1/jobs", params={"model": str(server.model), "label": f"key:{key}"})
    assert len(logged.records("request")) == 9
    assert key not in logged.text
    assert own not in logged.text


@pytest.mark.usefixtures("_own_logging")
def test_people_at_a_terminal_can_read_it(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = pty.openpty()
    with open(writing, "w") as terminal, open(reading, "rb", buffering=0) as screen:
        monkeypatch.setattr("sys.stderr", terminal)
        configure_logging(settings)
        structlog.get_logger("test").info("job_accepted", job_id="job_1")
        terminal.flush()
        shown = os.read(screen.fileno(), 4096).decode()
    assert "job_accepted" in shown
    assert "job_1" in shown
    assert not shown.startswith("{")


@pytest.mark.usefixtures("_own_logging")
def test_the_level_is_a_setting(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(settings.model_copy(update={"log_level": "warning"}))
    log = structlog.get_logger("test")
    log.info("told_to_nobody")
    log.warning("told")
    records: list[dict[str, Any]] = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(record["event"], record["level"]) for record in records] == [("told", "warning")]
