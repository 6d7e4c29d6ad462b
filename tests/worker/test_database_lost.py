"""What becomes of a job whose database goes away and comes back: nothing."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, event, select

import migrations
from api.jobs.ledger.models import Attempt, AttemptOutcome, Job, JobStatus
from api.settings import Settings
from tests.integration.service import eventually
from tests.support.postgres import PostgresServer
from tests.worker.conftest import Submit
from worker.context import WorkerContext
from worker.heartbeat import Presence
from worker.tasks import run_jobs

ENGINE_SECONDS = 60
LEASE_SECONDS = 2


@pytest.fixture(scope="module")
def mortal() -> Iterator[PostgresServer]:
    """A PostgreSQL that tests may kill."""
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        server = PostgresServer(Path(folder), ("fsync=off",))
        server.start()
        migrations.upgrade(server.url())
        yield server
        server.stop()


@pytest.fixture
def worker(mortal: PostgresServer, tmp_path: Path, tiny_llama: Path) -> Iterator[WorkerContext]:
    settings = Settings(
        data_dir=tmp_path / "data",
        database_url=mortal.url(),
        local_roots=(tiny_llama.parent,),
        device="cpu",
        lease_seconds=LEASE_SECONDS,
        heartbeat_seconds=LEASE_SECONDS / 2,
    )
    context = WorkerContext.open(settings)
    yield context
    context.close()


def ended(worker: WorkerContext, job_id: str) -> tuple[Job, list[AttemptOutcome | None]]:
    """The job, and how its attempts ended."""
    with worker.database.read() as session:
        outcomes = select(Attempt.outcome).where(Attempt.job_id == job_id).order_by(Attempt.number)
        return session.get_one(Job, job_id), list(session.scalars(outcomes))


def test_an_attempt_goes_on_when_its_database_is_back(
    worker: WorkerContext, submit: Submit, mortal: PostgresServer
) -> None:
    """Although it was away for longer than a lease, and the engine ended meanwhile."""
    job_id = submit()
    thread = threading.Thread(target=run_jobs, args=(worker, Presence(worker)))
    thread.start()
    eventually(lambda: any(worker.scratch.folder.glob("*/engine.log")), ENGINE_SECONDS, "no engine began")
    mortal.kill()
    eventually(lambda: any(worker.scratch.folder.glob("*/output")), ENGINE_SECONDS, "no engine ended")
    mortal.start()
    thread.join()
    job, outcomes = ended(worker, job_id)
    assert (job.status, job.attempts_counted) == (JobStatus.SUCCEEDED, 0)
    assert outcomes == [AttemptOutcome.SUCCEEDED]


def test_answers_that_were_lost_count_nothing(worker: WorkerContext, submit: Submit) -> None:
    """The claim's, after which nobody knows who holds the job, and the success's, whose files must stay."""
    job_id = submit()
    to_lose = [JobStatus.RUNNING.value, JobStatus.SUCCEEDED.value]

    def commit_and_break(connection: Connection) -> None:
        statement = "SELECT status FROM jobs WHERE id = %s"
        status = connection.exec_driver_sql(statement, (job_id,)).scalar_one()
        if to_lose and status == to_lose[0]:
            to_lose.pop(0)
            connection.connection.commit()
            connection.connection.dbapi_connection.close()

    event.listen(worker.database.engine, "commit", commit_and_break)
    run_jobs(worker, Presence(worker))
    event.remove(worker.database.engine, "commit", commit_and_break)
    job, outcomes = ended(worker, job_id)
    assert to_lose == []
    assert (job.status, job.attempts_counted) == (JobStatus.SUCCEEDED, 0)
    assert outcomes == [AttemptOutcome.PREEMPTED, AttemptOutcome.SUCCEEDED]
    assert job.manifest_key is not None
    assert worker.store.exists(job.manifest_key)
