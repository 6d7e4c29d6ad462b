"""A job in the database, and what a worker does to it: what the tests of leases share."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import select, update

from api import database as clock
from api.database import Database
from api.jobs.ledger.models import Attempt, Job, JobEvent
from api.jobs.queue import expiry, leases, workers
from api.jobs.queue.leases import Lease
from api.jobs.queue.workers import WorkerIdentity
from tests.api.conftest import Server

CPU = WorkerIdentity("cpu-1", "cpu", host_bytes=1000, gpu_bytes=0)
GPU = WorkerIdentity("gpu-1", "cuda", host_bytes=1000, gpu_bytes=500)
WORKER = WorkerIdentity("worker-1", "cpu", 1 << 40, 0)
LEASE = 90.0
HEADER: dict[str, Any] = {"type": "plan", "work_key": "w" * 64, "fingerprint": "f" * 64, "resolved": {}}


def claim(database: Database, worker: WorkerIdentity = CPU) -> Lease | None:
    with database.write() as session:
        claimed = leases.claim(session, worker, LEASE)
        return claimed[0] if claimed else None


def must_claim(database: Database, worker: WorkerIdentity = CPU) -> Lease:
    lease = claim(database, worker)
    assert lease is not None
    return lease


def job_row(database: Database, job_id: str = "job") -> Job:
    with database.read() as session:
        return session.get_one(Job, job_id)


def attempt_row(database: Database, number: int, job_id: str = "job") -> Attempt:
    with database.read() as session:
        return session.get_one(Attempt, (job_id, number))


def event_types(database: Database, job_id: str = "job") -> list[str]:
    """Types in order; fails if a seq is missing."""
    with database.read() as session:
        events = session.scalars(
            select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)
        ).all()
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    return [event.type for event in events]


def let_lease_run_out(database: Database, job_id: str = "job") -> None:
    with database.write() as session:
        past = clock.now(session) - timedelta(seconds=1)
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=past))


def make_available(database: Database, job_id: str = "job") -> None:
    """Skip the delay before the next attempt."""
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(available_at=clock.now(session)))


def reap(database: Database) -> int:
    """What every worker does again and again."""
    with database.write() as session:
        return expiry.expire(session) + expiry.reap(session)


def layer(number: int) -> dict[str, Any]:
    entry = {"layer": number, "file": f"{number}.safetensors", "sha256": "a" * 64, "size": 7, "report": {}}
    return {
        "layer": number,
        "layers_total": 2,
        "relative_error": 0.1,
        "seconds": 1.0,
        "eta_seconds": 1.0,
        "entry": entry,
    }


def start(server: Server) -> Lease:
    """A worker takes the job that was submitted."""
    with server.database.write() as session:
        claimed = leases.claim(session, WORKER, 90)
        assert claimed is not None
        workers.heartbeat(session, WORKER, claimed[0].job_id)
    return claimed[0]
