"""Every error is problem+json with a stable code, whatever goes wrong."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import pytest
import structlog
from fastapi.testclient import TestClient
from sqlalchemy import event, make_url, text
from sqlalchemy.exc import OperationalError

from api.errors import pointer_to
from api.main import create_app
from api.observability import configure_logging, hide_secrets
from api.security import new_key
from api.settings import Settings
from tests.api.conftest import Server

JSON_TYPE = {"Content-Type": "application/json"}


class Answer(Protocol):
    """What is read of a test client's response."""

    @property
    def status_code(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    def json(self) -> Any: ...


@pytest.fixture
def _own_logging() -> Iterator[None]:
    """Puts logging back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def assert_problem(answer: Answer, status: int, code: str) -> dict[str, Any]:
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["code"]) == (status, code), body
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    assert body["request_id"] == answer.headers["X-Request-ID"]
    return body


def test_unknown_route_and_method(server: Server) -> None:
    assert_problem(server.http.get("/v2/jobs"), 404, "route_not_found")
    answer = server.http.put("/v1/jobs")
    assert_problem(answer, 405, "method_not_allowed")
    assert "GET" in answer.headers["Allow"]


@pytest.mark.parametrize(
    ("body", "code", "pointer"),
    [
        ({"scheme": "W4A16"}, "missing", "/model"),
        ({"model": 5, "scheme": "W4A16"}, "string_type", "/model"),
        ({"model": "/m", "scheme": "W4A16", "wat": 1}, "extra_forbidden", "/wat"),
        ({"model": "/m", "scheme": "W4A16", "group_size": 0}, "greater_than_equal", "/group_size"),
        ({"model": "/m", "scheme": "W4A16", "priority": 101}, "less_than_equal", "/priority"),
        (
            {"model": "/m", "scheme": "W4A16", "labels": {"a/b": "x\0"}},
            "string_pattern_mismatch",
            "/labels/a~1b",
        ),
        (
            {"model": "/m", "recipe": [{"type": "rtn", "scheme": "W8A8", "group_size": -1}]},
            "greater_than_equal",
            "/recipe/0/group_size",
        ),
        (
            {"model": "/m", "recipe": {"steps": [{"type": "rtn"}]}},
            "missing",
            "/recipe/steps/0/scheme",
        ),
        (
            {"model": "/m", "scheme": "W4A16", "calibration": {"max_seq_length": 1}},
            "greater_than_equal",
            "/calibration/max_seq_length",
        ),
        (
            {"model": "/m", "scheme": "W4A16", "calibration": {"num_calibration_samples": 10**30}},
            "less_than_equal",
            "/calibration/num_calibration_samples",
        ),
        (
            {"model": "/m", "scheme": "W4A16", "calibration": {"seed": 2**63}},
            "less_than",
            "/calibration/seed",
        ),
        ({"model": "/m", "scheme": "W4A16", "dataset": {"text_column": "t"}}, "value_error", "/dataset"),
        ({"model": "/m", "scheme": "W4A16", "name": "\ud800"}, "string_unicode", "/name"),
    ],
)
def test_bad_fields_are_pointed_at(server: Server, body: dict[str, Any], code: str, pointer: str) -> None:
    answer = server.http.post("/v1/jobs", content=json.dumps(body), headers=JSON_TYPE)
    problem = assert_problem(answer, 422, "validation_error")
    assert (code, pointer) in [(error["code"], error["pointer"]) for error in problem["errors"]]


def test_bad_parameters_are_named(server: Server) -> None:
    problem = assert_problem(server.http.get("/v1/jobs", params={"limit": 0}), 422, "validation_error")
    assert problem["errors"][0]["parameter"] == "limit"
    problem = assert_problem(server.http.get("/v1/jobs", params={"status": "done"}), 422, "validation_error")
    assert problem["errors"][0]["parameter"] == "status"
    answer = server.http.post("/v1/jobs", json=server.body(), headers={"Idempotency-Key": "k" * 201})
    assert_problem(answer, 422, "validation_error")


def test_bodies_that_are_not_json(server: Server) -> None:
    assert_problem(server.http.post("/v1/jobs", content=b'{"model', headers=JSON_TYPE), 400, "invalid_json")
    assert_problem(server.http.post("/v1/jobs", content=b"\xff\xfe", headers=JSON_TYPE), 400, "invalid_json")
    assert_problem(server.http.post("/v1/jobs", content=b"[1]", headers=JSON_TYPE), 422, "not_a_json_object")
    text_type = {"Content-Type": "text/plain"}
    plain = server.http.post("/v1/jobs", content=json.dumps(server.body()), headers=text_type)
    assert "Content-Type" in assert_problem(plain, 422, "not_a_json_object")["hint"]
    deep = b"[" * 100_000
    assert server.http.post("/v1/jobs", content=deep, headers=JSON_TYPE).status_code == 400


def test_a_body_too_large_is_refused_by_its_length(server: Server) -> None:
    body = server.body(dataset={"texts": ["x" * 300_000]})
    assert_problem(server.http.post("/v1/jobs", json=body), 413, "body_too_large")


def test_a_body_too_large_is_refused_as_it_comes(server: Server) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 10_000

    answer = server.http.post("/v1/jobs", content=parts(), headers=JSON_TYPE)
    assert_problem(answer, 413, "body_too_large")
    assert server.http.get("/v1/jobs").json()["items"] == []


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_database_that_is_busy_is_a_503(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.database.BUSY_TIMEOUT_SECONDS", 0)
    file = make_url(server.settings.database_url).database
    holder = sqlite3.connect(str(file), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE").close()
    key = {"Authorization": server.http.headers["Authorization"]}
    with TestClient(create_app(server.settings)) as http:
        answer = http.post("/v1/jobs", json=server.body(), headers=key)
    holder.close()
    assert_problem(answer, 503, "database_unavailable")
    assert answer.headers["Retry-After"]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_database_that_keeps_everybody_waiting_is_a_503(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All connections are taken, and none comes back in time."""
    key = {"Authorization": server.http.headers["Authorization"]}
    monkeypatch.setattr("api.database._POOL_SIZE", 1)
    monkeypatch.setattr("api.database._POOL_OVERFLOW", 0)
    app = create_app(server.settings)
    with TestClient(app, raise_server_exceptions=False) as http:
        engine = app.state.context.database.engine
        monkeypatch.setattr(engine.pool, "_timeout", 0)
        with engine.connect():
            answer = http.get("/v1/jobs", headers=key)
    assert_problem(answer, 503, "database_unavailable")
    assert answer.headers["Retry-After"]


@pytest.mark.usefixtures("_own_logging")
def test_an_unexpected_failure_tells_nothing_of_the_inside(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row that no migration could have made breaks the route that reads it."""
    job = server.submit()
    with server.database.write() as session:
        session.execute(text("UPDATE jobs SET status = 'no such status'"))
    configure_logging(server.settings)
    answer = server.http.get(f"/v1/jobs/{job['id']}")
    problem = assert_problem(answer, 500, "internal_error")
    assert "no such status" not in answer.text
    logged = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    (failure,) = [record for record in logged if record["event"] == "request_failed"]
    assert failure["request_id"] == problem["request_id"]
    assert "no such status" in failure["exception"]


def test_what_was_not_committed_is_not_accepted(server: Server) -> None:
    """The transaction ends before the answer is sent, so that a failing commit is no 202."""

    def fail(_connection: object) -> None:
        raise OperationalError("COMMIT", {}, sqlite3.OperationalError("disk I/O error"))

    key = {"Authorization": server.http.headers["Authorization"]}
    app = create_app(server.settings)
    with TestClient(app) as http:
        event.listen(app.state.context.database.engine, "commit", fail)
        answer = http.post("/v1/jobs", json=server.body(), headers=key)
        event.remove(app.state.context.database.engine, "commit", fail)
    assert_problem(answer, 503, "database_unavailable")
    assert server.http.get("/v1/jobs").json()["items"] == []


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_text_that_postgresql_cannot_hold_is_refused(server: Server) -> None:
    texts = {"texts": ["A text with \0 in it."]}
    answer = server.http.post("/v1/jobs", json=server.body(dataset=texts, method="rtn"))
    assert_problem(answer, 422, "value_not_storable")
    assert_problem(server.http.get("/v1/jobs/%00"), 422, "value_not_storable")
    assert_problem(server.http.get("/v1/jobs?model=a%00"), 422, "value_not_storable")


def test_request_ids_are_taken_over_if_they_are_clean(server: Server) -> None:
    assert server.http.get("/livez", headers={"X-Request-ID": "abc-1"}).headers["X-Request-ID"] == "abc-1"
    made = server.http.get("/livez", headers={"X-Request-ID": "a b\tc"}).headers["X-Request-ID"]
    assert made != "a b\tc"


def test_pointers_leave_out_what_is_not_in_the_body() -> None:
    body = {"recipe": {"steps": [{"type": "gptq"}]}}
    assert pointer_to(("recipe", "steps", 0, "gptq", "scheme"), body, "missing") == "/recipe/steps/0/scheme"
    assert pointer_to(("recipe", "function-wrap", "steps"), body, "x") == "/recipe/steps"
    assert pointer_to((), body, "x") == ""


def test_secrets_are_hidden_in_logs() -> None:
    key = new_key()
    record = hide_secrets(
        None,
        "info",
        {
            "event": f"got {key}",
            "authorization": "Basic abc",
            "url": "redis://user:pass@host/0",
            "nested": {"api_key": "x", "list": [f"Bearer {key}"]},
            "count": 3,
        },
    )
    text = json.dumps(record)
    assert key not in text
    assert "Basic abc" not in text
    assert "pass" not in text
    assert record["count"] == 3
    assert record["nested"]["api_key"] == "[hidden]"


@pytest.mark.usefixtures("_own_logging")
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_tracebacks_hide_secrets_too(
    settings: Settings, capsys: pytest.CaptureFixture[str], log_format: str
) -> None:
    key = new_key()
    configure_logging(settings.model_copy(update={"log_format": log_format}))
    try:
        raise ValueError(f"refused {key}")
    except ValueError:
        structlog.get_logger("test").exception("broken")
    logged = capsys.readouterr().err
    assert "refused [hidden]" in logged
    assert key not in logged


def test_a_parameter_that_is_not_there_is_named(server: Server) -> None:
    """`?statsu=failed` would list every job."""
    problem = assert_problem(server.http.get("/v1/jobs?statsu=failed&limit=1"), 422, "validation_error")
    assert [(each["code"], each["parameter"]) for each in problem["errors"]] == [
        ("unknown_parameter", "statsu")
    ]
    job = server.submit()["id"]
    assert_problem(server.http.get(f"/v1/jobs/{job}?waiting=1"), 422, "validation_error")
    assert server.http.get(f"/v1/jobs/{job}?wait=0&since=0").status_code == 200
