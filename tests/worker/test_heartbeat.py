"""A lease is kept while its job runs, and what ends it is noticed soon."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from api.jobs import service
from api.jobs.ledger.models import Job
from api.jobs.queue import expiry, leases, workers
from api.jobs.queue.leases import Lease, LeaseLost
from tests.worker.conftest import Submit
from worker.context import WorkerContext
from worker.heartbeat import CancelRequested, LeaseKeeper, Periodic, Presence


def claim(worker: WorkerContext) -> tuple[Lease, Job]:
    with worker.database.write() as session:
        claimed = leases.claim(session, worker.identity, 60)
    assert claimed is not None
    return claimed


def keeper(worker: WorkerContext, lease: Lease) -> LeaseKeeper:
    return LeaseKeeper(worker.database, lease, lease_seconds=60, heartbeat_seconds=1)


def raised_by(check: Callable[[], None], seconds: float) -> Exception | None:
    """What `check` raises within that time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            check()
        except Exception as error:
            return error
        time.sleep(0.02)
    return None


def test_a_lease_is_renewed_while_the_block_runs(worker: WorkerContext, submit: Submit) -> None:
    job_id = submit()
    lease, job = claim(worker)
    before = job.lease_until
    assert before is not None
    with keeper(worker, lease) as kept:
        assert raised_by(kept.check, 2.5) is None
    with worker.database.read() as session:
        after = session.get_one(Job, job_id).lease_until
    assert after is not None
    assert after > before


def test_a_cancel_is_noticed_within_two_seconds(worker: WorkerContext, submit: Submit) -> None:
    job_id = submit()
    lease, job = claim(worker)
    with keeper(worker, lease) as kept:
        with worker.database.write() as session:
            service.cancel(session, job.project_id, job_id)
        assert isinstance(raised_by(kept.check, 2), CancelRequested)


def test_a_lost_lease_is_noticed_within_two_seconds(worker: WorkerContext, submit: Submit) -> None:
    submit()
    lease, _job = claim(worker)
    with keeper(worker, lease) as kept:
        with worker.database.write() as session:
            expiry.release_all(session)
        assert isinstance(raised_by(kept.check, 2), LeaseLost)


def rename(worker: WorkerContext, table: str, name: str) -> None:
    with worker.database.write() as session:
        session.connection().exec_driver_sql(f"ALTER TABLE {table} RENAME TO {name}")


def test_a_database_that_is_gone_ends_no_work_although_the_lease_runs_out(
    worker: WorkerContext, submit: Submit
) -> None:
    job_id = submit()
    lease, job = claim(worker)
    with LeaseKeeper(worker.database, lease, lease_seconds=0.5, heartbeat_seconds=0.2) as kept:
        rename(worker, "jobs", "elsewhere")
        assert raised_by(kept.check, 2.5) is None
        rename(worker, "elsewhere", "jobs")
        assert raised_by(kept.check, 1.5) is None
    with worker.database.read() as session:
        renewed = session.get_one(Job, job_id).lease_until
    assert job.lease_until is not None
    assert renewed is not None
    assert renewed < job.lease_until  # the claim was for 60 seconds


def test_a_worker_leaves_without_its_database(worker: WorkerContext) -> None:
    rename(worker, "workers", "elsewhere")
    Presence(worker).leave()


def test_presence_shows_the_running_job(worker: WorkerContext, submit: Submit) -> None:
    job_id = submit()
    presence = Presence(worker)

    def shown() -> list[str | None]:
        with worker.database.read() as session:
            return [row.job_id for row, _ in workers.list_alive(session, 60)]

    presence.refresh()
    assert shown() == [None]
    with presence.busy(job_id):
        assert shown() == [job_id]
    assert shown() == [None]
    presence.leave()
    assert shown() == []


@pytest.mark.parametrize(
    ("error", "level"),
    [(RuntimeError("once"), "error"), (OperationalError("SELECT 1", {}, Exception()), "warning")],
)
def test_a_periodic_action_goes_on_after_an_error(error: Exception, level: str) -> None:
    calls: list[int] = []

    def action() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise error

    thread = Periodic("test", 0.01, action)
    with capture_logs() as logs:
        thread.start()
        deadline = time.monotonic() + 5
        while len(calls) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        thread.stop()
    assert [line["log_level"] for line in logs] == [level]
    seen = len(calls)
    assert seen >= 3
    time.sleep(0.05)
    assert len(calls) == seen
