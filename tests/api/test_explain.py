"""Every query that is made often finds its rows by an index: EXPLAIN of what the code sends to a database of
20,000 jobs. What may be read whole has a row for each project, worker or webhook."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Connection, event, text
from sqlalchemy.orm import Session

from api import database as clock
from api.batches import repository as batches
from api.cursors import Position
from api.database import Database
from api.jobs.ledger import events, repository
from api.jobs.ledger.models import ACTIVE, Job, JobStatus
from api.jobs.ledger.repository import JobFilter, JobOrder
from api.jobs.queue import deduplication, expiry, leases, quotas, retention, workers
from api.jobs.queue.leases import Lease
from api.jobs.submission import digests
from api.projects import repository as projects
from api.projects.models import Project
from api.webhooks import outbox
from api.webhooks import repository as webhooks
from api.webhooks.outbox import Answer, Message
from api.webhooks.repository import DeliveryFilter
from tests.api.jobs.leasing import CPU, LEASE, layer, must_claim
from tests.support.jobs import job_id, multiply, new_job, new_plan
from tests.support.postgres import new_database

JOBS = 20_000
RUNNING = Lease(job_id(99), 1, 1, "worker-1")
MIDDLE = Position(datetime(2026, 1, 1, 3, tzinfo=UTC), "job")
LONG_AGO = datetime(2026, 1, 1, 0, 2, tzinfo=UTC)
SMALL = {"projects", "workers", "webhooks"}
PARTIAL = {"ix_jobs_deleted_at"}
"""Indexes that have nothing but what is looked for, so that they need no condition."""

Query = Callable[[Session], object]


def page(order: JobOrder = JobOrder.NEWEST, after: Position | None = MIDDLE, **wanted: Any) -> Query:
    return lambda session: repository.list_page(session, "p", JobFilter(**wanted), order, after, 21)


def days_since(moment: datetime, session: Session) -> float:
    return (clock.now(session) - moment).total_seconds() / 86_400


def settle(session: Session) -> None:
    message = Message("msg_" + job_id(1), "wh01", 1, clock.now(session), "https://example.com/", "", "")
    outbox.settle(session, message, Answer(410))


QUERIES: dict[str, tuple[Query, str]] = {
    "a key": (lambda s: projects.find_key(s, job_id(5)), "uq_api_keys_digest"),
    "keys": (lambda s: projects.list_keys(s, "p", MIDDLE, 21), "ix_api_keys_project_id"),
    "a job": (lambda s: repository.get_with_attempts(s, "p", job_id(5)), "pk_jobs"),
    "its version": (lambda s: repository.version(s, "p", job_id(5)), "pk_jobs"),
    "its row, held": (lambda s: repository.get_for_update(s, "p", job_id(5)), "pk_jobs"),
    "its attempts": (lambda s: repository.get_with_attempts(s, "p", job_id(5)), "pk_attempts"),
    "its events": (lambda s: events.page(s, job_id(5), 1, 100), "pk_job_events"),
    "jobs that are watched": (
        lambda s: repository.event_seqs(s, [job_id(n) for n in range(1, 101)]),
        "pk_jobs",
    ),
    "jobs": (page(after=None), "ix_jobs_list"),
    "more jobs": (page(), "ix_jobs_list"),
    "more jobs, the oldest first": (page(JobOrder.OLDEST), "ix_jobs_list"),
    "jobs in a state": (page(status=JobStatus.FAILED), "ix_jobs_list_status"),
    "jobs in a state, the oldest first": (
        page(JobOrder.OLDEST, None, status=JobStatus.FAILED),
        "ix_jobs_list_status",
    ),
    "jobs of a model": (page(model="/models/7"), "ix_jobs_list_model"),
    "jobs with a scheme": (page(scheme="W4A16"), "ix_jobs_list"),
    "jobs by a method": (page(method="rtn"), "ix_jobs_list"),
    "jobs with a rare label": (page(labels=[("run", "77")]), "ix_jobs_labels"),
    "jobs of some days": (
        page(after=None, created_after=LONG_AGO, created_before=MIDDLE.created_at),
        "ix_jobs_list",
    ),
    "jobs of a batch": (page(after=None, batch="job_100000000"), "ix_jobs_batch"),
    "a batch": (lambda s: batches.get(s, "p", "job_100000000"), "pk_batches"),
    "batches": (lambda s: batches.list_page(s, "p", MIDDLE, 21), "ix_batches_list"),
    "counts of batches": (lambda s: batches.count_jobs(s, ["job_100000000"]), "ix_jobs_batch"),
    "items of a batch": (lambda s: batches.job_ids(s, "job_100000000", 10, 21), "ix_jobs_batch"),
    "a batch to be cancelled": (
        lambda s: batches.cancellable_for_update(s, "job_100000000"),
        "ix_jobs_batch",
    ),
    "a used Idempotency-Key": (
        lambda s: repository.find_idempotency_key(s, "p", "POST /v1/jobs", job_id(5), clock.now(s)),
        "pk_idempotency_keys",
    ),
    "keys of a deleted job": (
        lambda s: repository.forget_idempotency_keys(s, job_id(5)),
        "ix_idempotency_keys_resource_id",
    ),
    "room in the queue": (lambda s: quotas.room_in_queue(s, "p", 5), "ix_jobs_list_status"),
    "use of a project": (lambda s: repository.count(s, "p", ACTIVE), "ix_jobs_list_status"),
    "depths of queues": (repository.queue_depths, "ix_jobs_claim"),
    "a claim": (lambda s: leases.claim(s, CPU, LEASE), "ix_jobs_claim"),
    "a claim where projects are limited": (
        lambda s: leases.claim(s, CPU, LEASE, max_running=1000),
        "ix_jobs_list_status",
    ),
    "a lease renewed": (lambda s: leases.renew(s, RUNNING, LEASE), "pk_jobs"),
    "a lease held": (lambda s: leases.status_of(s, RUNNING), "pk_jobs"),
    "a layer solved": (lambda s: leases.record_layer(s, RUNNING, layer(1), "work/a"), "pk_jobs"),
    "an end": (lambda s: leases.release(s, RUNNING), "pk_attempts"),
    "what a sweep counts": (lambda s: leases.queued_by_device(s, max_running=1000), "ix_jobs_claim"),
    "what a reaper looks for": (expiry.has_expired, "ix_jobs_deadline"),
    "what a reaper ends": (expiry.reap, "ix_jobs_claim"),
    "who is alive": (lambda s: workers.list_alive(s, LEASE), "pk_jobs"),
    "layers of long ago": (
        lambda s: retention.past_resume(s, days_since(LONG_AGO, s), 100),
        "ix_job_layers_at",
    ),
    "what was made of some work": (
        lambda s: deduplication.attach_new(s, [Job(id="new", project_id="p", cache="use", cache_key="k")]),
        "ix_jobs_cache",
    ),
    "those that wait for a job": (lambda s: deduplication.finish_attached(s, job_id(5)), "ix_jobs_twin"),
    "digests of files": (lambda s: digests.known(s, ["a", "b"]), "pk_file_digests"),
    "digests of long ago": (lambda s: digests.forget_old(s, 10), "ix_file_digests_at"),
    "layers to be forgotten": (lambda s: retention.forget_layers(s, job_id(97)), "pk_job_layers"),
    "deleted jobs": (lambda s: retention.deleted(s, 100), "ix_jobs_deleted_at"),
    "a deleted job's row": (lambda s: retention.remove(s, job_id(94)), "pk_jobs"),
    "jobs with its plan": (lambda s: retention.remove(s, job_id(94)), "ix_jobs_plan_id"),
    "Idempotency-Keys of long ago": (
        lambda s: repository.forget_old_idempotency_keys(s, 10),
        "ix_idempotency_keys_created_at",
    ),
    "whether a message is due": (outbox.is_due, "ix_webhook_deliveries_due"),
    "the message that is due": (
        lambda s: outbox.claim(s, busy=["another"]),
        "ix_webhook_deliveries_due",
    ),
    "a message that was answered": (settle, "pk_webhook_deliveries"),
    "messages to a webhook": (
        lambda s: webhooks.deliveries(s, "wh01", DeliveryFilter(), MIDDLE, 21),
        "ix_webhook_deliveries_list",
    ),
    "messages about a job": (
        lambda s: webhooks.deliveries(s, "wh01", DeliveryFilter(job_id=job_id(5)), None, 21),
        "ix_webhook_deliveries_job_id",
    ),
    "messages of long ago": (
        lambda s: outbox.forget(s, days_since(LONG_AGO, s), 10),
        "ix_webhook_deliveries_created_at",
    ),
}
ELSEWHERE = {
    ("sqlite", "a key"): "index_api_keys_2",
    ("sqlite", "jobs with a rare label"): "ix_jobs_list",
    ("sqlite", "what a reaper ends"): "ix_jobs_ended",  # it begins with the status too
    **{
        ("postgresql", name): "ix_jobs_list_status"  # whose first column, of few values here, is skipped over
        for name in ("depths of queues", "what a sweep counts", "what a reaper ends")
    },
}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def crowded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """A database with much of everything."""
    if request.param == "postgresql":
        with new_database(request.getfixturevalue("postgres")) as url:
            database = Database(url)
            fill(database)
            yield database
            database.close()
    else:
        file = tmp_path_factory.mktemp("crowded") / "bitmill.db"
        shutil.copy(request.getfixturevalue("migrated_file"), file)
        database = Database(f"sqlite:///{file}")
        fill(database)
        yield database
        database.close()


OF_JOBS = (
    "INSERT INTO batches (id, project_id, labels, accepted, refused, refusals, created_at)"
    " SELECT substr(id, 1, 13), 'p', '{}', 100, 0, '[]', min(created_at)"
    " FROM jobs WHERE id <> 'original' GROUP BY substr(id, 1, 13)",
    "UPDATE jobs SET batch_id = substr(id, 1, 13), batch_index = CAST(substr(id, 14) AS integer),"
    " cache_key = id, manifest_key = CASE WHEN status = 'succeeded' THEN id END,"
    " deduplicated_from = CASE WHEN status = 'succeeded' AND id LIKE '%5' THEN 'job_1' END,"
    " deleted_at = CASE WHEN id LIKE '%94' THEN created_at END,"
    " queue_deadline = CASE WHEN status = 'failed' THEN created_at"
    " WHEN status = 'queued' THEN '2099-01-01 00:00:00.000000' END WHERE id <> 'original'",
    "INSERT INTO job_layers"
    " (job_id, work_key, layer, fingerprint, attempt, store_key, sha256, size, entry, at)"
    " SELECT id, 'w', 0, 'f', 1, 'k', 's', 1, '{}', created_at FROM jobs WHERE finished_at IS NOT NULL",
    "INSERT INTO workers (id, device_class, host_bytes, gpu_bytes, job_id, started_at, heartbeat_at)"
    " SELECT id, 'cpu', 1, 0, id, created_at, created_at FROM jobs WHERE status = 'running'",
    "INSERT INTO projects (id, name, created_at) SELECT id, id, created_at FROM jobs WHERE id LIKE '%00'",
    "INSERT INTO api_keys (id, project_id, name, digest, scopes, created_at)"
    " SELECT id, substr(id, 1, 12) || '00', 'k', id, '[]', created_at FROM jobs"
    f" WHERE id BETWEEN '{job_id(100)}' AND '{job_id(JOBS)}'",
    "INSERT INTO idempotency_keys (project_id, route, key, body_sha256, resource_id, created_at)"
    " SELECT 'p', 'POST /v1/jobs', id, 's', id,"
    " CASE WHEN id LIKE '%00' THEN created_at ELSE CURRENT_TIMESTAMP END FROM jobs",
    "INSERT INTO file_digests (stamp, sha256, at)"
    " SELECT id, 's', CASE WHEN id LIKE '%00' THEN created_at ELSE CURRENT_TIMESTAMP END FROM jobs",
    "INSERT INTO webhooks (id, project_id, url, events, all_jobs, secret, created_at)"
    " SELECT 'wh' || substr(id, 13), 'p', 'https://example.com/', '[]', true, 's', created_at"
    f" FROM jobs WHERE id BETWEEN '{job_id(100)}' AND '{job_id(199)}'",
    "INSERT INTO webhook_deliveries"
    " (id, webhook_id, job_id, event, body, status, attempts, next_attempt_at, created_at)"
    " SELECT 'msg_' || id, 'wh' || substr(id, 13), id, 'job_succeeded', '{}',"
    " CASE WHEN id LIKE '%90' THEN 'pending' ELSE 'delivered' END, 1,"
    " CASE WHEN id LIKE '%90' THEN created_at END, created_at FROM jobs WHERE finished_at IS NOT NULL",
    "ANALYZE",
)


def fill(database: Database) -> None:
    with database.write() as session:
        now = clock.now(session)
        session.add_all([Project(id="p", name="p", created_at=now), new_plan()])
        session.flush()
        session.add(new_job("original", now, work_key="w", fingerprint="f"))
        session.flush()
        multiply(session, "original", JOBS, events_each=2)
        for statement in OF_JOBS:
            session.execute(text(statement))


@contextmanager
def recorded(database: Database) -> Iterator[list[tuple[str, Any]]]:
    """What is sent to the database during the block, but for what only inserts."""
    sent: list[tuple[str, Any]] = []

    def record(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_more: Any) -> None:
        if re.match(r"SELECT.*\sFROM|UPDATE|DELETE", statement, re.DOTALL):
            sent.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", record)
    try:
        yield sent
    finally:
        event.remove(database.engine, "before_cursor_execute", record)


def explained(connection: Connection, statement: str, parameters: Any) -> tuple[set[str], set[str]]:
    """The indexes that a statement uses, and the tables that it reads from one end to the other."""
    if connection.dialect.name == "sqlite":
        steps = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
        plan = "\n".join(step.detail for step in steps)
        plan = re.sub(r"sqlite_autoindex_(\w+)_1\b", r"pk_\1", plan).replace("sqlite_auto", "")
        used = re.findall(r"SEARCH .* USING (?:COVERING )?INDEX (\w+)", plan)
        return set(used), set(re.findall(r"SCAN (\w+)(?! VIRTUAL TABLE| ROW)\b", plan))
    (plan,) = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {statement}", parameters).scalar_one()
    used, whole, left = set(), set(), [plan["Plan"]]
    while left:
        node = left.pop()
        left += node.get("Plans", ())
        if "Index Cond" in node or node.get("Index Name") in PARTIAL:
            used.add(node["Index Name"])
        elif node["Node Type"] in ("Seq Scan", "Index Scan", "Index Only Scan"):
            whole.add(node["Relation Name"])
    return used, whole


@pytest.mark.parametrize("name", QUERIES)
def test_an_index_finds(crowded: Database, name: str) -> None:
    query, index = QUERIES[name]
    index = ELSEWHERE.get((crowded.engine.dialect.name, name), index)
    used, whole = set(), set()
    with crowded.write() as session:
        with recorded(crowded) as sent:
            query(session)
        for statement in sent:
            found = explained(session.connection(), *statement)
            used |= found[0]
            whole |= found[1]
        session.rollback()
    assert whole <= SMALL
    assert index in used


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_what_happens_while_a_job_runs_changes_no_index(database: Database) -> None:
    with database.write() as session:
        now = clock.now(session)
        session.add_all([Project(id="p", name="p", created_at=now), new_plan()])
        session.flush()
        session.add(new_job("job", now))
    lease = must_claim(database)
    counts = (f"pg_stat_get_xact_tuples_{kind}('jobs'::regclass)" for kind in ("updated", "hot_updated"))
    counting = text(f"SELECT {', '.join(counts)}")
    with database.write() as session:
        before = session.execute(counting).one()
        leases.renew(session, lease, LEASE)
        leases.set_phase(session, lease, "compress")
        leases.append_event(session, lease, "warning", {})
        after = session.execute(counting).one()
    assert [now - then for now, then in zip(after, before, strict=True)] == [4, 4]
