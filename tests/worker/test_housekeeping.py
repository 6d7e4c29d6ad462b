"""What workers do beside their jobs."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import OperationalError

from api import database
from api.jobs.ledger.models import IdempotencyKey, Job, JobLayer, JobStatus
from api.jobs.queue import leases
from tests.worker.conftest import Submit
from worker import housekeeping
from worker.celery_app import WorkerRefused, run_worker
from worker.context import WorkerContext
from worker.deliveries import Sender
from worker.heartbeat import Presence
from worker.housekeeping import (
    Reaper,
    delete_expired,
    delete_resumable,
    remove_deleted,
    sweep,
    wake_ups,
)
from worker.tasks import run_jobs


@pytest.mark.parametrize(
    ("queued", "idle", "sent"),
    [
        ({}, {"cpu": 2}, {"cpu": 0, "any": 0}),
        ({"cpu": 5}, {"cpu": 2}, {"cpu": 2, "any": 0}),
        ({"cpu": 1, "any": 9}, {"cpu": 2, "cuda": 1}, {"cpu": 1, "cuda": 0, "any": 2}),
        ({"cuda": 3}, {"cpu": 2}, {"cpu": 0, "any": 0}),
        ({"any": 3, "cuda": 3}, {}, {"any": 0}),
    ],
)
def test_no_more_wake_ups_than_jobs_and_idle_workers(
    queued: dict[str, int], idle: dict[str, int], sent: dict[str, int]
) -> None:
    assert wake_ups(queued, Counter(idle)) == sent


def test_an_expired_lease_is_reaped_once_the_database_answers_for_long_enough(
    worker: WorkerContext, submit: Submit
) -> None:
    """After an outage all leases have expired; workers that live are given time to renew theirs."""
    job_id = submit()
    with worker.database.write() as session:
        assert leases.claim(session, worker.identity, -1) is not None

    def status() -> JobStatus:
        with worker.database.read() as session:
            return session.get_one(Job, job_id).status

    def rename(table: str, name: str) -> None:
        with worker.database.write() as session:
            session.connection().exec_driver_sql(f"ALTER TABLE {table} RENAME TO {name}")

    lease_seconds = 0.2
    settings = worker.settings.model_copy(update={"lease_seconds": lease_seconds})
    reaper = Reaper(replace(worker, settings=settings))
    reaper.reap()
    assert status() == JobStatus.RUNNING
    time.sleep(lease_seconds)
    rename("jobs", "elsewhere")
    with pytest.raises(OperationalError):
        reaper.reap()
    rename("elsewhere", "jobs")
    reaper.reap()
    assert status() == JobStatus.RUNNING
    time.sleep(lease_seconds)
    reaper.reap()
    assert status() == JobStatus.QUEUED


def test_who_has_nothing_to_do_waits_for_no_writer(worker: WorkerContext, submit: Submit) -> None:
    """SQLite has one at a time."""
    submit()
    sender = Sender(worker.database, worker.settings)
    with worker.database.write() as session:
        session.execute(update(Job).values(name="held"))
        Reaper(worker).reap()
        sweep(worker)
        sender.send_due()
        remove_deleted(worker.database, worker.store)
    sender.close()


def test_all_that_ran_out_is_reaped(
    worker: WorkerContext, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.jobs.queue.expiry.REAPED_AT_ONCE", 2)
    for _ in range(3):
        submit(max_queue_seconds=1)
    with worker.database.write() as session:
        session.execute(update(Job).values(queue_deadline=database.now(session)))
    Reaper(worker).reap()
    with worker.database.read() as session:
        assert session.scalars(select(Job.status)).all() == [JobStatus.EXPIRED] * 3


def test_a_project_runs_no_more_than_the_setting_says(worker: WorkerContext, submit: Submit) -> None:
    job_id = submit()
    full = replace(worker, settings=worker.settings.model_copy(update={"max_running": 0}))
    run_jobs(full, Presence(full))
    with worker.database.read() as session:
        assert session.get_one(Job, job_id).status == JobStatus.QUEUED


def two_jobs_with_files(worker: WorkerContext, submit: Submit, tmp_path: Path) -> tuple[str, str]:
    """Each with a finished layer's shard and a file that an upload left."""
    shard = tmp_path / "shard"
    shard.write_bytes(b"layer")
    job_ids = submit(), submit()
    for each in job_ids:
        worker.store.put(f"work/{each}/aa.safetensors", shard)
        worker.store.put(f"artifacts/{each}/1/model.safetensors", shard)
    return job_ids


def add_layer(worker: WorkerContext, job_id: str) -> None:
    """The row of that shard."""
    with worker.database.write() as session:
        session.add(
            JobLayer(
                job_id=job_id,
                work_key="k",
                layer=0,
                fingerprint="f",
                attempt=1,
                size=5,
                entry={},
                store_key=f"work/{job_id}/aa.safetensors",
                sha256="aa",
                at=database.now(session) - timedelta(days=3),
            )
        )


def test_finished_layers_are_forgotten_when_the_resume_window_is_over(
    worker: WorkerContext, submit: Submit, tmp_path: Path
) -> None:
    job_id, other_id = two_jobs_with_files(worker, submit, tmp_path)
    with worker.database.read() as session:
        at = database.now(session) - timedelta(days=3)
    for each in (job_id, other_id):
        add_layer(worker, each)
    with worker.database.write() as session:
        ended = {"status": JobStatus.FAILED, "layers_done": 1, "finished_at": at}
        session.execute(update(Job).where(Job.id == job_id).values(**ended))

    delete_resumable(worker.database, worker.store, resume_days=4)
    assert worker.store.exists(f"work/{job_id}/aa.safetensors")
    delete_resumable(worker.database, worker.store, resume_days=2)
    assert list(worker.store.list(f"work/{job_id}")) == list(worker.store.list(f"artifacts/{job_id}")) == []
    assert worker.store.exists(f"work/{other_id}/aa.safetensors")
    with worker.database.read() as session:
        assert session.scalars(select(JobLayer.job_id)).all() == [other_id]
        assert session.get_one(Job, job_id).layers_done == 0


def test_keys_of_requests_are_forgotten_after_a_day_a_part_at_a_time(
    worker: WorkerContext, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "_ROWS_AT_ONCE", 2)
    submit()
    with worker.database.write() as session:
        (project_id,) = session.scalars(select(Job.project_id))
        for hours in range(22, 27):
            at = database.now(session) - timedelta(hours=hours, seconds=1)
            row = {"key": str(hours), "body_sha256": "", "resource_id": "job", "created_at": at}
            session.add(IdempotencyKey(project_id=project_id, route="r", **row))
    delete_expired(worker)
    with worker.database.read() as session:
        assert session.scalars(select(IdempotencyKey.key)).all() == ["22", "23"]


def test_what_fenced_out_attempts_left_is_removed_and_what_is_published_stays(
    worker: WorkerContext, submit: Submit, tmp_path: Path
) -> None:
    job_id, _ = two_jobs_with_files(worker, submit, tmp_path)
    for token in (3, 4):
        worker.store.put(f"artifacts/{job_id}/{token}/manifest.json", tmp_path / "shard")
    add_layer(worker, job_id)
    with worker.database.write() as session:
        ended = {
            "status": JobStatus.SUCCEEDED,
            "manifest_key": f"artifacts/{job_id}/3/manifest.json",
            "finished_at": database.now(session) - timedelta(days=3),
        }
        session.execute(update(Job).where(Job.id == job_id).values(**ended))
    delete_resumable(worker.database, worker.store, resume_days=2)
    assert list(worker.store.list("artifacts/" + job_id)) == [f"artifacts/{job_id}/3/manifest.json"]


def test_files_of_deleted_jobs_go_before_their_rows(
    worker: WorkerContext, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, other_id = two_jobs_with_files(worker, submit, tmp_path)
    with worker.database.write() as session:
        gone = {"status": JobStatus.FAILED, "deleted_at": database.now(session)}
        session.execute(update(Job).where(Job.id == job_id).values(**gone))

    with monkeypatch.context() as broken:
        broken.setattr(worker.store, "delete", Mock(side_effect=OSError("the store is away")))
        with pytest.raises(OSError, match="away"):
            remove_deleted(worker.database, worker.store)
    remove_deleted(worker.database, worker.store)
    assert list(worker.store.list(f"work/{job_id}")) == list(worker.store.list(f"artifacts/{job_id}")) == []
    assert worker.store.exists(f"artifacts/{other_id}/1/model.safetensors")
    with worker.database.read() as session:
        assert session.scalars(select(Job.id)).all() == [other_id]


def test_a_worker_on_the_embedded_broker_is_refused(worker: WorkerContext) -> None:
    with pytest.raises(WorkerRefused, match="redis://"):
        run_worker(worker.settings)
