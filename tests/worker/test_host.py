"""A worker whose host is broken: no job fails of it, and the queue is left to others."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from sqlalchemy import select
from structlog.testing import capture_logs

from api.jobs.ledger.models import Attempt, AttemptOutcome, Job, JobStatus
from tests.worker.conftest import Submit
from worker import engine, host
from worker.context import WorkerContext
from worker.heartbeat import Presence
from worker.host import Rest
from worker.tasks import run_jobs


def attempts(worker: WorkerContext) -> list[Attempt]:
    with worker.database.read() as session:
        return list(session.scalars(select(Attempt)))


def test_a_worker_without_its_scratch_folder_leaves_the_queue_alone(
    worker: WorkerContext, submit: Submit
) -> None:
    first, second = submit(), submit(scheme="FP8_DYNAMIC")
    shutil.rmtree(worker.scratch.folder)
    with capture_logs():
        run_jobs(worker, Presence(worker))
        run_jobs(worker, Presence(worker))  # the next wake-up
    (attempt,) = attempts(worker)
    assert (attempt.job_id, attempt.outcome, attempt.error_code) == (
        first,
        AttemptOutcome.HOST_FAILED,
        "host_failed",
    )
    assert "No such file or directory" in (attempt.error_message or "")
    with worker.database.read() as session:
        jobs = [session.get_one(Job, job_id) for job_id in (first, second)]
    assert [(job.status, job.attempts_counted) for job in jobs] == [(JobStatus.QUEUED, 0)] * 2
    assert attempt.ended_at is not None
    assert (jobs[0].available_at - attempt.ended_at).total_seconds() > 30
    worker.scratch.folder.mkdir()  # for the end of the fixture


def test_a_process_that_cannot_be_started_is_no_fault_of_the_job(
    worker: WorkerContext, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "RUNNER", ("/no/such/python",))
    submit()
    with capture_logs():
        run_jobs(worker, Presence(worker))
    assert [attempt.outcome for attempt in attempts(worker)] == [AttemptOutcome.HOST_FAILED]


def test_a_scratch_folder_that_goes_away_in_an_attempt_is_to_blame(
    worker: WorkerContext, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"""
import shutil, sys
if "worker.runner" in sys.orig_argv:
    import compression
    real = compression.compress
    def compress(*given, **named):
        shutil.rmtree({str(worker.scratch.folder)!r})
        open({str(worker.scratch.folder)!r}, "x").close()
        return real(*given, **named)
    compression.compress = compress
"""
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])]))
    submit()
    with capture_logs():
        run_jobs(worker, Presence(worker))
    assert [attempt.outcome for attempt in attempts(worker)] == [AttemptOutcome.HOST_FAILED]
    worker.scratch.folder.unlink()
    worker.scratch.folder.mkdir()


def test_a_rest_is_longer_each_time_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(host.time, "monotonic", lambda: now)
    rest = Rest()
    for seconds in (60, 120, 240, 480, 900, 900):
        assert rest.is_over()
        with capture_logs():
            rest.note(host_is_fit=False)
        now += seconds - 1
        assert not rest.is_over()
        now += 1
    assert rest.is_over()
    rest.note(host_is_fit=True)
    with capture_logs():
        rest.note(host_is_fit=False)
    now += 60
    assert rest.is_over()
