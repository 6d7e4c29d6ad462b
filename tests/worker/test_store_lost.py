"""Jobs whose files are kept in S3, and what becomes of them when it is away."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from api import database
from api.jobs.ledger import events
from api.jobs.ledger.models import Attempt, AttemptOutcome, Job, JobStatus
from api.store import s3 as module
from api.store.factory import open_store
from tests.integration.service import commands, eventually
from tests.support.gate import Gate
from tests.support.s3 import READER, S3Server
from tests.worker.conftest import Submit, cancel, until_an_engine_is_done
from worker import retry
from worker.context import WorkerContext
from worker.heartbeat import Presence
from worker.tasks import run_jobs


@pytest.fixture
def remote(gate: Gate, worker: WorkerContext) -> WorkerContext:
    """A worker that keeps files there."""
    settings = worker.settings.model_copy(update={"store_url": gate.store_url})
    return dataclasses.replace(worker, settings=settings, store=open_store(gate.store_url))


def run(worker: WorkerContext, job_id: str) -> tuple[Job, Attempt]:
    run_jobs(worker, Presence(worker))
    with worker.database.read() as session:
        return session.get_one(Job, job_id), session.get_one(Attempt, (job_id, 1))


def test_a_job_is_kept_and_published_there(remote: WorkerContext, submit: Submit) -> None:
    job_id = submit()
    job, attempt = run(remote, job_id)
    assert (job.status, attempt.error_message) == (JobStatus.SUCCEEDED, None)
    assert job.manifest_key is not None
    with remote.store.open(job.manifest_key) as file:
        manifest = json.load(file)
    folder = job.manifest_key.rpartition("/")[0]
    for entry in manifest["files"]:
        assert remote.store.size(f"{folder}/{entry['name']}") == entry["size"]
    assert len(list(remote.store.list(f"work/{job_id}"))) == job.layers_total


def test_nothing_begins_while_the_store_is_away(
    remote: WorkerContext, submit: Submit, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "STORE_RETRY_SECONDS", 0)
    job_id = submit()
    gate.shut()
    job, attempt = run(remote, job_id)
    assert (job.status, job.attempts_counted) == (JobStatus.QUEUED, 0)
    assert (attempt.outcome, attempt.error_code) == (AttemptOutcome.STORE_LOST, "store_unreachable")
    assert attempt.ended_at is not None
    assert (job.available_at - attempt.ended_at).total_seconds() > 30
    with remote.database.read() as session:
        ended = events.page(session, job_id, 0, 100)[-1]
    assert (ended.type, ended.data["code"]) == ("attempt_ended", "store_unreachable")


def test_a_store_that_is_away_for_a_moment_costs_no_attempt_at_all(
    remote: WorkerContext, submit: Submit, gate: Gate
) -> None:
    gate.shut()
    with capture_logs() as logs:

        def open_once_noticed() -> None:
            noticed = "store_unreachable"
            eventually(lambda: noticed in {line["event"] for line in list(logs)}, 10, "nobody noticed")
            gate.open()

        thread = threading.Thread(target=open_once_noticed)
        thread.start()
        job, _attempt = run(remote, submit())
        thread.join()
    assert (job.status, job.attempts_made) == (JobStatus.SUCCEEDED, 1)


def test_a_store_that_goes_away_for_long_counts_no_attempt(
    remote: WorkerContext, submit: Submit, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "STORE_RETRY_SECONDS", 0)
    gate.shut_after = 2_000  # a probe is smaller, a layer is not
    job, attempt = run(remote, submit())
    assert (job.status, job.attempts_counted) == (JobStatus.QUEUED, 0)
    assert (attempt.outcome, attempt.error_code) == (AttemptOutcome.STORE_LOST, "store_unreachable")
    assert job.layers_done == 0


@pytest.mark.parametrize("deaf", [False, True])
def test_a_cancel_does_not_wait_for_a_store_that_hangs(
    remote: WorkerContext, submit: Submit, gate: Gate, deaf: bool
) -> None:
    """deaf: the engine does not hear that it should end either."""
    job_id = submit()
    gate.hold_after = 2_000
    cancelled: list[float] = []

    def cancel_then() -> None:
        while not gate.is_held:
            time.sleep(0.01)
        if deaf:
            (engine,) = [pid for pid, line in commands() if "worker.runner" in line and job_id in line]
            os.kill(engine, signal.SIGSTOP)
        cancelled.append(cancel(remote, job_id))

    thread = threading.Thread(target=cancel_then)
    thread.start()
    job, attempt = run(remote, job_id)
    ended = time.monotonic()
    thread.join()
    assert ended - cancelled[0] < 5
    assert (job.status, attempt.outcome) == (JobStatus.CANCELLED, AttemptOutcome.CANCELLED)


def test_a_cancel_does_not_wait_for_a_store_that_hangs_when_the_upload_begins(
    remote: WorkerContext, submit: Submit, gate: Gate, slow_to_exit: Callable[[float], None]
) -> None:
    slow_to_exit(3)
    job_id = submit()
    cancelled: list[float] = []

    def phase() -> str | None:
        with remote.database.read() as session:
            return session.get_one(Job, job_id).phase

    def cancel_then() -> None:
        until_an_engine_is_done(remote)
        gate.hold()
        while phase() != "upload":
            time.sleep(0.01)
        cancelled.append(cancel(remote, job_id))

    thread = threading.Thread(target=cancel_then)
    thread.start()
    job, attempt = run(remote, job_id)
    ended = time.monotonic()
    thread.join()
    assert ended - cancelled[0] < 5
    assert (job.status, attempt.outcome) == (JobStatus.CANCELLED, AttemptOutcome.CANCELLED)


def test_a_store_that_is_killed_in_the_upload_is_waited_for(
    remote: WorkerContext, submit: Submit, gate: Gate, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 64 << 10)
    worker = dataclasses.replace(remote, store=open_store(gate.store_url))
    job_id = submit()
    killed_at: list[str | None] = []

    def phase() -> str | None:
        with worker.database.read() as session:
            return session.get_one(Job, job_id).phase

    def kill_in_a_large_file() -> None:
        while phase() != "upload":
            time.sleep(0.01)
        gate.rate = 100_000
        while not s3.client.list_multipart_uploads(Bucket="store").get("Uploads"):
            time.sleep(0.01)
        s3.process.kill()
        killed_at.append(phase())
        gate.rate = None
        s3.process.start()

    thread = threading.Thread(target=kill_in_a_large_file)
    thread.start()
    job, attempt = run(worker, job_id)
    thread.join()
    assert killed_at == ["upload"]
    assert (job.status, attempt.error_message) == (JobStatus.SUCCEEDED, None)
    assert (job.attempts_made, job.attempts_counted) == (1, 0)
    assert job.manifest_key is not None
    with worker.store.open(job.manifest_key) as file:
        files = json.load(file)["files"]
    for entry in files:
        with worker.store.open(f"{job.manifest_key.rpartition('/')[0]}/{entry['name']}") as file:
            assert hashlib.sha256(file.read()).hexdigest() == entry["sha256"], entry["name"]


def test_a_store_that_refuses_is_asked_less_and_less(
    remote: WorkerContext, submit: Submit, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit()
    s3.use(monkeypatch, tmp_path, READER)
    worker = dataclasses.replace(remote, store=open_store("s3://store/none-of-the-reader-s"))
    pauses = []
    for number in range(1, 7):
        job, _ = run(worker, job_id)
        with worker.database.write() as session:
            attempt = session.get_one(Attempt, (job_id, number))
            session.get_one(Job, job_id).available_at = database.now(session)
        assert (attempt.outcome, attempt.error_code) == (AttemptOutcome.STORE_LOST, "store_denied")
        assert attempt.ended_at is not None
        pauses.append(round((job.available_at - attempt.ended_at).total_seconds()))
    assert (job.status, job.attempts_counted) == (JobStatus.QUEUED, 0)
    assert pauses == [60, 120, 240, 480, 900, 900]
