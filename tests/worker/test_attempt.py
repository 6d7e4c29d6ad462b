"""Attempts that end otherwise than well, on the real engine. Kills and resumes are in tests/integration."""

from __future__ import annotations

import dataclasses
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy.exc import StatementError
from structlog.testing import capture_logs

from api.jobs.ledger import events
from api.jobs.ledger.models import Attempt, AttemptOutcome, Job, JobLayer, JobStatus
from api.jobs.queue import expiry, leases
from api.jobs.queue.attempts import NO_FACTS
from api.settings import Settings
from api.store.base import go_on
from compression.events import JOURNAL_FILE
from tests.support.postgres import PostgresServer, new_database
from tests.worker.conftest import Submit, cancel, queue, until_an_engine_is_done
from worker.context import WorkerContext
from worker.heartbeat import Presence
from worker.publication import Publisher
from worker.resume import restore
from worker.tasks import run_jobs

CANCEL_AT_UPLOAD = """
CREATE TRIGGER cancel_at_upload AFTER UPDATE OF phase ON jobs WHEN NEW.phase = 'upload'
BEGIN UPDATE jobs SET status = 'cancelling' WHERE id = NEW.id; END
"""


def run(worker: WorkerContext) -> None:
    run_jobs(worker, Presence(worker))


def job_of(worker: WorkerContext, job_id: str) -> tuple[Job, Attempt]:
    with worker.database.read() as session:
        return session.get_one(Job, job_id), session.get_one(Attempt, (job_id, 1))


def attempt_folders(worker: WorkerContext) -> list[Path]:
    return [path for path in worker.scratch.folder.iterdir() if path.is_dir()]


def once_an_engine_runs(worker: WorkerContext, action: Callable[[], None]) -> threading.Thread:
    """A thread that calls `action` when an attempt has started its engine."""

    def wait() -> None:
        while not any((folder / "engine.log").exists() for folder in attempt_folders(worker)):
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_an_engine_past_its_memory_limit_is_ended(worker: WorkerContext, submit: Submit) -> None:
    limited = dataclasses.replace(
        worker, settings=worker.settings.model_copy(update={"engine_memory_bytes": 64 << 20})
    )
    job_id = submit()
    run(limited)
    job, attempt = job_of(worker, job_id)
    assert (job.status, job.error_code) == (JobStatus.FAILED, "memory_limit")
    assert attempt.outcome == AttemptOutcome.OUT_OF_MEMORY
    assert attempt.peak_host_bytes is not None
    assert attempt.peak_host_bytes > 64 << 20
    assert attempt_folders(worker) == []


def test_a_cancel_does_not_wait_for_an_engine_that_is_done_and_stays(
    worker: WorkerContext, submit: Submit, slow_to_exit: Callable[[float], None]
) -> None:
    slow_to_exit(60)
    job_id = submit()
    cancelled: list[float] = []

    def cancel_then() -> None:
        until_an_engine_is_done(worker)
        cancelled.append(cancel(worker, job_id))

    thread = threading.Thread(target=cancel_then)
    thread.start()
    run(worker)
    ended = time.monotonic()
    thread.join()
    assert ended - cancelled[0] < 4
    job, attempt = job_of(worker, job_id)
    assert (job.status, attempt.outcome) == (JobStatus.CANCELLED, AttemptOutcome.CANCELLED)


def test_a_worker_that_lost_its_lease_writes_nothing_more(worker: WorkerContext, submit: Submit) -> None:
    job_id = submit()

    def lose() -> None:
        with worker.database.write() as session:
            expiry.release_all(session)
        worker.stopping.set()  # so that the job is not claimed again

    thread = once_an_engine_runs(worker, lose)
    started = time.monotonic()
    run(worker)
    thread.join()
    assert time.monotonic() - started < 5
    job, attempt = job_of(worker, job_id)
    assert (job.status, attempt.outcome) == (JobStatus.QUEUED, AttemptOutcome.PREEMPTED)
    with worker.database.read() as session:
        told = [event.type for event in events.page(session, job_id, 0, 100)]
    assert told[-1] == "attempt_ended"
    assert attempt_folders(worker) == []


def test_a_cancel_during_the_upload_wins_and_the_upload_is_removed(
    worker: WorkerContext, submit: Submit
) -> None:
    job_id = submit()
    with worker.database.write() as session:
        session.connection().exec_driver_sql(CANCEL_AT_UPLOAD)
    run(worker)
    job, attempt = job_of(worker, job_id)
    assert (job.status, job.manifest_key) == (JobStatus.CANCELLED, None)
    assert attempt.outcome == AttemptOutcome.CANCELLED
    assert list(worker.store.list("artifacts")) == []
    assert len(list(worker.store.list(f"work/{job_id}"))) == job.layers_total


@contextmanager
def full_disks() -> Iterator[None]:
    """Real ones to whoever writes: no file of this process and its children grows past some bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_scratch_folder_without_room_is_a_full_disk(
    tmp_path: Path, tiny_llama: Path, postgres: PostgresServer
) -> None:
    settings = {"data_dir": tmp_path / "data", "local_roots": (tiny_llama.parent,), "device": "cpu"}
    with new_database(postgres) as url:
        worker = WorkerContext.open(Settings(database_url=url, **settings))
        job_id = queue(worker, model=str(tiny_llama), scheme="W8A8")
        next_id = queue(worker, model=str(tiny_llama), scheme="W8A8")
        with capture_logs(), full_disks():
            run(worker)
            run(worker)
        job, attempt = job_of(worker, job_id)
        with worker.database.read() as session:
            next_job = session.get_one(Job, next_id)
        worker.close()
    assert next_job.attempts_made == 0  # the disk is full for it too
    assert (job.status, job.error_code) == (JobStatus.FAILED, "disk_full")
    assert attempt.outcome == AttemptOutcome.FAILED
    assert "Free disk space" in (job.error_message or "")


def test_a_journal_is_restored_without_what_the_store_lost(worker: WorkerContext, tmp_path: Path) -> None:
    shard = tmp_path / "shard"
    shard.write_bytes(b"layer 0")
    worker.store.put("work/job/a.safetensors", shard)
    rows = [
        JobLayer(
            layer=0, store_key="work/job/a.safetensors", entry={"type": "layer", "layer": 0, "file": "0"}
        ),
        JobLayer(
            layer=1, store_key="work/job/b.safetensors", entry={"type": "layer", "layer": 1, "file": "1"}
        ),
    ]
    partial = tmp_path / "output.partial"
    assert restore(worker.store, {"type": "plan", "work_key": "k"}, rows, partial, go_on) == [1]
    assert (partial / "0").read_bytes() == b"layer 0"
    assert (partial / "0").stat().st_nlink > 1
    assert (partial / JOURNAL_FILE).read_text() == (
        '{"type": "plan", "work_key": "k"}\n{"type": "layer", "layer": 0, "file": "0"}\n'
    )


def test_a_job_of_another_version_says_what_is_not_supported(worker: WorkerContext, submit: Submit) -> None:
    job_id = submit()
    with worker.database.write() as session:
        session.get_one(Job, job_id).recipe = {"steps": [{"method": "of tomorrow"}]}
    with capture_logs():
        run_jobs(worker, Presence(worker))
    with worker.database.read() as session:
        job = session.get_one(Job, job_id)
    assert (job.status, job.error_code, job.attempts_made) == (JobStatus.FAILED, "recipe_not_supported", 1)
    assert "recipe/steps/0" in (job.error_message or "")


def test_a_report_that_no_database_can_hold_leaves_no_upload(
    worker: WorkerContext, submit: Submit, tmp_path: Path
) -> None:
    submit()
    with worker.database.write() as session:
        claimed = leases.claim(session, worker.identity, 90)
    assert claimed is not None
    lease, job = claimed
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "config.json").write_text("{}")
    publisher = Publisher(worker, lease, job, worker.check)
    with pytest.raises(StatementError):
        publisher.publish(tmp_path / "output", {}, {"totals": {"a set is no JSON"}}, NO_FACTS)
    assert list(worker.store.list("artifacts")) == []
