"""How many jobs of a project wait and run at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api import database as clock
from api.database import Database
from api.jobs.ledger.models import JobStatus
from api.jobs.queue import leases, quotas, workers
from api.jobs.queue.workers import WorkerIdentity
from api.jobs.service import cancel
from api.main import create_app
from api.projects.models import Project
from api.security import Scope
from tests.api.conftest import Server
from tests.api.jobs.leasing import CPU, LEASE, WORKER, claim, must_claim, start
from tests.api.projects.limiting import limit
from tests.api.test_security import new_server_key


def post(server: Server, path: str = "/v1/jobs", **more: Any) -> tuple[int, str | None]:
    """Status and, of an error, its code."""
    answer = server.http.post(path, **{"json": server.body(), **more})
    return answer.status_code, answer.json().get("code")


FULL = (429, "quota_queued")


class TestQueued:
    def test_submit_clone_and_retry_need_a_place(self, server: Server) -> None:
        limit(server.database, max_queued=2)
        first, second = (f"/v1/jobs/{server.submit()['id']}" for _ in range(2))
        refused = server.http.post("/v1/jobs", json=server.body())
        assert (refused.status_code, refused.json()["code"]) == FULL
        assert "2" in refused.json()["detail"]
        assert refused.json()["hint"]
        assert post(server, f"{first}/clone", json={}) == FULL
        assert post(server, f"{first}/cancel") == (202, None)
        assert post(server, f"{first}/clone", json={}) == (202, None)
        assert post(server, f"{first}/retry") == FULL
        assert post(server, f"{second}/retry") == (409, "not_retryable")
        start(server)
        assert post(server, f"{first}/retry") == (202, None)
        assert server.http.get("/v1/project").json()["use"] == {"queued": 2, "running": 1}

    def test_a_batch_fills_the_queue_and_says_what_is_left_over(self, server: Server) -> None:
        limit(server.database, max_queued=3)
        server.submit()
        jobs = [server.body(), {}, server.body(), server.body()]
        batch = server.http.post("/v1/batches", json={"jobs": jobs}).json()
        codes = [item.get("error", {}).get("code") for item in batch["items"]]
        assert codes == [None, "validation_error", None, "quota_queued"]
        assert (batch["counts"]["accepted"], batch["counts"]["refused"]) == (2, 2)

    def test_what_queues_nothing_needs_none(self, server: Server) -> None:
        limit(server.database, max_queued=1)
        key = {"Idempotency-Key": "k"}
        first = server.http.post("/v1/jobs", json=server.body(), headers=key)
        assert server.http.post("/v1/jobs", json=server.body(), headers=key).json() == first.json()
        assert post(server, params={"dry_run": True}) == (200, None)
        assert post(server, "/v1/jobs/estimate") == (200, None)

    def test_another_project_has_its_own(self, server: Server) -> None:
        limit(server.database, max_queued=0)
        other = new_server_key(server, "other", Scope.SUBMIT)
        assert post(server) == FULL
        assert post(server, headers=other) == (202, None)
        limit(server.database, max_queued=None)
        assert post(server) == (202, None)

    def test_the_setting_holds_for_those_without_their_own(self, server: Server) -> None:
        settings = server.settings.model_copy(update={"max_queued": 0})
        with TestClient(create_app(settings), headers=dict(server.http.headers)) as http:
            assert http.post("/v1/jobs", json=server.body()).status_code == 429
            assert http.get("/v1/project").json()["limits"]["max_queued"] == 0
            limit(server.database, max_queued=1)
            assert http.post("/v1/jobs", json=server.body()).status_code == 202

    def test_submissions_at_once_get_no_more_than_there_is(self, server: Server) -> None:
        limit(server.database, max_queued=3)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: post(server), range(8)))
        assert sorted(found) == [(202, None)] * 3 + [FULL] * 5

    def test_many_at_once_ask_how_much_room_there_is(
        self, database: Database, add_job: Callable[..., str]
    ) -> None:
        add_job("a")
        add_job("b", status=JobStatus.CANCELLED)
        with database.write() as session:
            rooms = [quotas.room_in_queue(session, "p", maximum) for maximum in (None, 5, 1, 0)]
        assert rooms == [None, 4, 0, 0]


def add_other_project(database: Database) -> None:
    with database.write() as session:
        session.add(Project(id="q", name="q", created_at=clock.now(session)))


class TestRunning:
    def test_a_full_project_lets_others_pass(self, database: Database, add_job: Callable[..., str]) -> None:
        add_other_project(database)
        limit(database, "p", max_running=1)
        for number in range(3):
            add_job(f"urgent{number}", priority=9)
        add_job("patient", project_id="q")
        lease = must_claim(database)
        assert lease.job_id == "urgent0"
        with database.read() as session:
            assert leases.queued_by_device(session) == {"any": 1}
        assert must_claim(database).job_id == "patient"
        assert claim(database) is None
        with database.write() as session:
            cancel(session, "p", "urgent0")
        assert claim(database) is None  # its worker has not let go yet
        with database.write() as session:
            leases.mark_cancelled(session, lease)
        assert must_claim(database).job_id == "urgent1"
        limit(database, "p", max_running=None)
        assert must_claim(database).job_id == "urgent2"

    @pytest.mark.parametrize(
        ("own", "default", "taken"), [(None, 1, 1), (2, 1, 2), (1, 9, 1), (None, None, 3)]
    )
    def test_the_own_limit_goes_before_the_setting(
        self,
        database: Database,
        add_job: Callable[..., str],
        own: int | None,
        default: int | None,
        taken: int,
    ) -> None:
        limit(database, "p", max_running=own)
        for number in range(3):
            add_job(f"job{number}")
        found = []
        for _ in range(3):
            with database.write() as session:
                found.append(leases.claim(session, CPU, LEASE, max_running=default))
        assert sum(each is not None for each in found) == taken

    def test_workers_that_claim_at_once_take_no_more(
        self, database: Database, add_job: Callable[..., str]
    ) -> None:
        limit(database, "p", max_running=2)
        for number in range(8):
            add_job(f"job{number}")
        workers = [WorkerIdentity(f"w{number}", "cpu", 1000, 0) for number in range(8)]
        with ThreadPoolExecutor(8) as pool:
            taken = list(pool.map(lambda worker: claim(database, worker), workers))
        assert sum(lease is not None for lease in taken) == 2

    def test_the_job_says_that_it_waits_for_another(self, server: Server) -> None:
        limit(server.database, max_running=1)
        running, waiting = server.submit()["id"], server.submit()["id"]
        with server.database.write() as session:
            workers.heartbeat(session, WORKER)
        path = f"/v1/jobs/{waiting}"
        before = server.http.get(path)
        assert before.json()["obstacle"] is None
        assert start(server).job_id == running
        full = server.http.get(path, headers={"If-None-Match": before.headers["ETag"]})
        assert full.json()["obstacle"] == {
            "code": "quota_running",
            "message": "1 jobs of the project run, and 1 may at once.",
        }
        assert claim(server.database, WORKER) is None
        limit(server.database, max_running=2)
        assert server.http.get(path).json()["obstacle"] is None
        assert must_claim(server.database, WORKER).job_id == waiting
