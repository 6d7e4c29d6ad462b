"""Reading and cancelling batches."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select, text

from api.batches import repository
from api.jobs.ledger.models import Job, JobStatus
from api.jobs.queue import leases, retention
from tests.api.batches.test_submit import counts, submit
from tests.api.conftest import Server
from tests.api.jobs.leasing import event_types, start


def get(server: Server, path: str, **params: Any) -> dict[str, Any]:
    answer = server.http.get(path, params=params)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def job_ids(batch: dict[str, Any]) -> list[str]:
    return [item["job_id"] for item in batch["items"]]


def test_counts_follow_the_jobs(server: Server) -> None:
    batch = submit(server, {"jobs": [server.body()] * 3 + [server.body(scheme="W5A16")]})
    path = f"/v1/batches/{batch['id']}"
    lease = start(server)
    assert get(server, path)["counts"] == counts(total=4, accepted=3, refused=1, queued=2, running=1)
    with server.database.write() as session:
        leases.succeed(session, lease, {"modules": []}, "artifacts/x/1/manifest.json")
    done = counts(total=4, accepted=3, refused=1, queued=2, succeeded=1)
    assert get(server, path)["counts"] == done
    assert get(server, "/v1/batches")["items"][0]["counts"] == done
    assert server.http.get("/v1/batches").json()["items"][0].keys() == {
        "id",
        "name",
        "labels",
        "created_at",
        "counts",
    }


def test_a_deleted_job_is_counted_as_such(server: Server) -> None:
    batch = submit(server, {"jobs": [server.body()] * 2})
    first, second = job_ids(batch)
    server.http.post(f"/v1/jobs/{first}/cancel")
    assert server.http.delete(f"/v1/jobs/{first}").status_code == 204
    expected = counts(total=2, accepted=2, queued=1, deleted=1)
    for _ in range(2):  # while its row is there, and when it is gone
        now = get(server, f"/v1/batches/{batch['id']}")
        assert now["counts"] == expected
        assert now["items"] == [{"index": 1, "job_id": second}]
        with server.database.write() as session:
            retention.remove(session, first)


def test_items_in_pages(server: Server) -> None:
    bad = server.body(scheme="W5A16")
    batch = submit(server, {"jobs": [server.body(), bad, bad, server.body(), server.body()]})
    path, seen, cursor = f"/v1/batches/{batch['id']}", [], {}
    while True:
        page = get(server, path, limit=2, **cursor)
        seen.append(page["items"])
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert [len(items) for items in seen] == [2, 2, 1]
    assert [item for items in seen for item in items] == batch["items"]
    assert server.http.get(path, params={"limit": 0}).status_code == 422


def test_batches_in_pages(server: Server) -> None:
    made = [submit(server, {"name": str(n), "jobs": [server.body()]})["id"] for n in range(3)]
    first = get(server, "/v1/batches", limit=2)
    submit(server, {"jobs": [server.body()]})
    second = get(server, "/v1/batches", limit=2, cursor=first["next_cursor"])
    assert [batch["id"] for batch in (*first["items"], *second["items"])] == made[::-1]
    assert second["next_cursor"] is None
    answer = server.http.get("/v1/batches", params={"cursor": "x"})
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_cursor")


def test_jobs_of_a_batch(server: Server) -> None:
    server.submit()
    batch = submit(server, {"jobs": [server.body(), server.body(scheme="W8A8")]})
    server.submit()
    listed = get(server, "/v1/jobs", batch=batch["id"])["items"]
    assert [job["id"] for job in listed] == job_ids(batch)[::-1]
    assert len(get(server, "/v1/jobs", batch=batch["id"], scheme="W8A8")["items"]) == 1
    assert get(server, "/v1/jobs", batch="batch_1")["items"] == []


def test_cancelling_ends_what_waits_and_stops_what_runs(server: Server) -> None:
    alone = server.submit(priority=-1)["id"]
    batch = submit(server, {"jobs": [server.body()] * 4})
    succeeded, running, *waiting = job_ids(batch)
    with server.database.write() as session:
        leases.succeed(session, start(server), {"modules": []}, "artifacts/x/1/manifest.json")
    lease = start(server)
    path = f"/v1/batches/{batch['id']}/cancel"
    for _ in range(2):
        answer = server.http.post(path)
        assert (answer.status_code, answer.json()["counts"]) == (
            202,
            counts(total=4, accepted=4, succeeded=1, cancelling=1, cancelled=2),
        )
    for job_id in waiting:
        types = [each for each in event_types(server.database, job_id) if each != "warning"]
        assert types == ["job_queued", "cancel_requested", "job_cancelled"]
        assert get(server, f"/v1/jobs/{job_id}")["finished_at"] is not None
    with server.database.write() as session:
        leases.mark_cancelled(session, lease)
    assert event_types(server.database, running)[-3:] == [
        "cancel_requested",
        "attempt_ended",
        "job_cancelled",
    ]
    assert get(server, f"/v1/jobs/{succeeded}")["status"] == "succeeded"
    assert get(server, f"/v1/jobs/{alone}")["status"] == "queued"


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("POST", "/cancel")])
def test_a_batch_of_nobody_or_of_another(server: Server, method: str, path: str) -> None:
    batch = submit(server, {"jobs": [server.body()]})["id"]
    with server.database.write() as session:
        session.execute(text("INSERT INTO projects (id, name, created_at) VALUES ('q', 'q', '2026-01-01')"))
        session.execute(text("UPDATE batches SET project_id = 'q'"))
    for batch_id in ("batch_1", batch):
        answer = server.http.request(method, f"/v1/batches/{batch_id}{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "batch_not_found")
    assert get(server, "/v1/batches")["items"] == []
    with server.database.read() as session:
        assert session.scalars(select(Job.status)).all() == [JobStatus.QUEUED]


EXPLAINED = {
    "sqlite": ("EXPLAIN QUERY PLAN", "USING COVERING INDEX ix_jobs_batch"),
    "postgresql": ("EXPLAIN", "Index Only Scan using ix_jobs_batch"),
}


def test_counting_reads_the_index_alone(server: Server) -> None:
    """A row's status lies behind its plan, which may be megabytes."""
    explain, found = EXPLAINED[server.database.engine.dialect.name]
    with server.database.read() as session:
        query = repository.counting(["batch_1", "batch_2"])
        sql = query.compile(session.connection(), compile_kwargs={"literal_binds": True})
        if explain == "EXPLAIN":  # a table that is empty would be read whole
            session.execute(text("SET LOCAL enable_seqscan = off"))
            session.execute(text("SET LOCAL enable_bitmapscan = off"))
        steps = session.execute(text(f"{explain} {sql}")).all()
    assert found in str(steps)
