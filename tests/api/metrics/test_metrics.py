"""What Prometheus is told."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine, event, text, update

from api import database as clock
from api.database import Database
from api.jobs.ledger.models import Attempt, AttemptOutcome, Job
from api.jobs.queue import leases
from api.metrics import repository
from api.webhooks.models import Delivery, DeliveryStatus
from tests.api.conftest import Server
from tests.api.jobs.leasing import WORKER, start
from worker import metrics as worker_metrics

ROOT = Path(__file__).parents[3]
Samples = dict[tuple[str, ...], float]


def scrape(server: Server) -> dict[str, Samples]:
    """Values by name and by the values of their labels, in the order of the labels' names."""
    answer = server.http.get("/metrics", headers={"Authorization": ""})
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    found: dict[str, Samples] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def several(samples: Samples) -> Samples:
    """Without what is zero."""
    return {labels: value for labels, value in samples.items() if value}


def change(database: Database, table: type[Job | Attempt | Delivery], **values: Any) -> None:
    """Every row of a table."""
    with database.write() as session:
        session.execute(update(table).values(**values))


def ago(database: Database, **time: float) -> datetime:
    with database.read() as session:
        return clock.now(session) - timedelta(**time)


def test_requests_are_counted_and_timed_by_route(server: Server) -> None:
    for job in ("one", "two"):
        server.http.get(f"/v1/jobs/{job}")
    server.http.get("/nowhere")
    server.http.request("BREW", "/v1/jobs")
    server.submit()
    found = scrape(server)
    counts = found["bitmill_http_requests_total"]  # method, route, status
    assert counts["GET", "/v1/jobs/{job_id}", "404"] == 2
    assert counts["GET", "none", "404"] == 1
    assert counts["other", "/v1/jobs", "405"] == 1
    assert counts["POST", "/v1/jobs", "202"] == 1
    assert {route for _, route, _ in counts} == {"/v1/jobs/{job_id}", "/v1/jobs", "none"}
    assert found["bitmill_http_request_duration_seconds_count"]["GET", "/v1/jobs/{job_id}"] == 2
    assert found["bitmill_http_request_duration_seconds_sum"]["POST", "/v1/jobs"] > 0


def test_jobs_that_wait_and_run_and_their_workers(server: Server) -> None:
    server.submit(priority=1)
    server.submit()
    server.submit(resources={"device_class": "cuda"})
    start(server)
    change(server.database, Job, available_at=ago(server.database, seconds=100))
    found = scrape(server)
    assert several(found["bitmill_jobs"]) == {  # device class, status
        ("any", "queued"): 1,
        ("cuda", "queued"): 1,
        ("cpu", "running"): 1,
    }
    assert len(found["bitmill_jobs"]) == 9
    ages = found["bitmill_queue_oldest_job_age_seconds"]
    assert (ages["any",], ages["cuda",], ages["cpu",]) == (
        pytest.approx(100, abs=10),
        pytest.approx(100, abs=10),
        0,
    )
    assert found["bitmill_workers"] == {
        ("cpu", "busy"): 1,
        ("cpu", "idle"): 0,
        ("cuda", "busy"): 0,
        ("cuda", "idle"): 0,
    }
    assert found["bitmill_database_up"] == {(): 1}


def test_what_ended_within_the_last_hour(server: Server) -> None:
    for _ in range(2):
        server.submit()
        with server.database.write() as session:
            claimed = leases.claim(session, WORKER, 90)
            assert claimed is not None
            leases.succeed(session, claimed[0], {}, "key")
    server.http.post(f"/v1/jobs/{server.submit()['id']}/cancel")
    found = scrape(server)
    assert several(found["bitmill_jobs_ended_last_hour"]) == {
        ("any", "cancelled"): 1,
        ("cpu", "succeeded"): 2,
    }
    assert several(found["bitmill_attempts_ended_last_hour"]) == {("succeeded",): 2}
    assert len(found["bitmill_attempts_ended_last_hour"]) == len(AttemptOutcome)

    earlier = ago(server.database, minutes=61)
    change(server.database, Job, finished_at=earlier)
    change(server.database, Attempt, ended_at=earlier)
    found = scrape(server)
    assert several(found["bitmill_jobs_ended_last_hour"]) == {}
    assert several(found["bitmill_attempts_ended_last_hour"]) == {}


def test_messages_that_have_not_arrived(server: Server) -> None:
    webhook = server.http.post("/v1/webhooks", json={"url": "https://1.1.1.1/"}).json()["id"]
    for _ in range(3):
        server.http.post(f"/v1/webhooks/{webhook}/ping")
    assert scrape(server)["bitmill_webhook_deliveries"] == {("due",): 3, ("failed",): 0, ("later",): 0}
    change(server.database, Delivery, next_attempt_at=ago(server.database, hours=-1))
    assert scrape(server)["bitmill_webhook_deliveries"] == {("due",): 0, ("failed",): 0, ("later",): 3}
    change(server.database, Delivery, status=DeliveryStatus.FAILED, next_attempt_at=None)
    assert scrape(server)["bitmill_webhook_deliveries"] == {("due",): 0, ("failed",): 3, ("later",): 0}


def test_nothing_of_anybody_s_is_told(server: Server) -> None:
    job = server.submit(name="a-name", labels={"team": "a-team"})
    server.http.get(f"/v1/jobs/{job['id']}")
    server.http.get("/v1/jobs", params={"model": "a-model"})
    lease = start(server)
    told = server.http.get("/metrics").text
    for secret in (job["id"], "a-name", "a-team", "a-model", "tiny", "default", lease.worker_id):
        assert secret not in told


def test_without_a_database_requests_are_told_all_the_same(server: Server) -> None:
    server.http.get("/nowhere")
    with server.database.write() as session:
        session.execute(text("ALTER TABLE attempts RENAME TO elsewhere"))
    found = scrape(server)
    assert found["bitmill_database_up"] == {(): 0}
    assert "bitmill_jobs" not in found
    assert found["bitmill_http_requests_total"]["GET", "none", "404"] == 1


def test_the_process_tells_of_itself_and_of_the_worker_in_it(server: Server) -> None:
    worker_metrics.LAYERS.inc()
    found = scrape(server)
    assert found["process_resident_memory_bytes"][()] > 1 << 20
    assert found["bitmill_worker_layers_solved_total"][()] >= 1


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_an_index_alone_answers_each_question(database: Database) -> None:
    """A job's row is long; a scrape that read rows would take longer with every one of them."""
    asked: list[tuple[str, Any]] = []

    def note(_connection: object, _cursor: object, sql: str, parameters: Any, *_more: object) -> None:
        asked.append((sql, parameters))

    engine: Engine = database.engine
    event.listen(engine, "before_cursor_execute", note)
    with database.read() as session:
        now = clock.now(session)
        asked.clear()
        repository.jobs_held(session)
        repository.jobs_ended(session, now)
        repository.attempts_ended(session, now)
        repository.deliveries(session, now)
        event.remove(engine, "before_cursor_execute", note)
        plans = [
            " ".join(
                row[3] for row in session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", values)
            )
            for sql, values in asked
        ]
    assert len(plans) == 4
    for plan in plans:
        assert "SEARCH" in plan
        assert "USING COVERING INDEX" in plan


def test_the_pages_name_what_there_is_and_nothing_else(server: Server) -> None:
    server.http.get("/livez")
    told = set(re.findall(r"^# TYPE (bitmill_\w+) ", server.http.get("/metrics").text, re.MULTILINE))
    page = (ROOT / "docs" / "how-to.md").read_text()
    assert set(re.findall(r"^\| `(bitmill_\w+)` \|", page, re.MULTILINE)) == told
    alerts = (ROOT / "deploy" / "README.md").read_text()
    assert set(re.findall(r"\bbitmill_\w+", alerts)) <= told
