"""How an attempt ends, and what becomes of its job. Shared by the worker that holds it and by the reaper."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api import database
from api.jobs.ledger import events
from api.jobs.ledger.models import Attempt, AttemptOutcome, Job, JobStatus

_RETRY_DELAY_SECONDS = 2.0
_RETRY_DELAY_MAX_SECONDS = 60.0
_STORE_PAUSE_SECONDS = 60.0
_STORE_PAUSE_MAX_SECONDS = 900.0


@dataclass(frozen=True)
class AttemptFacts:
    """What the supervisor saw of the engine's process; None where it saw nothing."""

    exit_signal: int | None = None
    peak_host_bytes: int | None = None
    peak_gpu_bytes: int | None = None


NOTHING_SEEN = AttemptFacts()


def end_attempt(
    session: Session,
    job_id: str,
    number: int,
    outcome: AttemptOutcome,
    code: str | None = None,
    message: str | None = None,
    facts: AttemptFacts = NOTHING_SEEN,
) -> None:
    """Close an attempt's row and tell `attempt_ended`. The caller holds the job's row."""
    attempt = session.get_one(Attempt, (job_id, number))
    attempt.ended_at = database.now(session)
    attempt.seconds = (attempt.ended_at - attempt.started_at).total_seconds()
    attempt.outcome = outcome
    attempt.error_code = code
    attempt.error_message = message
    attempt.exit_signal = facts.exit_signal
    attempt.peak_host_bytes = facts.peak_host_bytes
    attempt.peak_gpu_bytes = facts.peak_gpu_bytes
    data: dict[str, Any] = {"outcome": outcome.value, "seconds": attempt.seconds}
    if code is not None:
        data |= {"code": code, "message": message}
    events.append(session, job_id, "attempt_ended", data, attempt=number)


def give_back(
    session: Session,
    job_id: str,
    number: int,
    outcome: AttemptOutcome,
    facts: AttemptFacts = NOTHING_SEEN,
    *,
    why: tuple[str, str] | None = None,
    delay_seconds: float = 0,
) -> JobStatus:
    """End an attempt without counting it: the job waits again, or is cancelled where that was asked for.

    why: code and message of the attempt. The caller holds the job's row.
    """
    code, message = why or (None, None)
    end_attempt(session, job_id, number, outcome, code, message, facts)
    job = let_go(session, job_id)
    if job.status == JobStatus.CANCELLING:
        return _end(session, job, JobStatus.CANCELLED)
    return _requeue(session, job, delay_seconds)


def count_failure(
    session: Session,
    job_id: str,
    number: int,
    outcome: AttemptOutcome,
    code: str,
    message: str,
    facts: AttemptFacts = NOTHING_SEEN,
    *,
    retryable: bool,
) -> JobStatus:
    """End a failed attempt, counting it: the job waits again while attempts are left, else it has failed.

    A job that is being cancelled ends cancelled. The caller holds the job's row.
    """
    end_attempt(session, job_id, number, outcome, code, message, facts)
    job = let_go(session, job_id)
    job.attempts_counted += 1
    if job.status == JobStatus.CANCELLING:
        return _end(session, job, JobStatus.CANCELLED)
    if retryable and job.attempts_counted < job.max_attempts:
        return _requeue(session, job, retry_delay(job.attempts_counted))
    job.error_code, job.error_message = code, message
    return _end(session, job, JobStatus.FAILED, {"code": code, "message": message})


def let_go(session: Session, job_id: str) -> Job:
    """Take a job from its worker. The token rises: who still holds the old lease is fenced out."""
    job = session.get_one(Job, job_id, populate_existing=True)
    job.lease_owner = None
    job.lease_until = None
    job.lease_token += 1
    job.phase = None
    return job


def _requeue(session: Session, job: Job, delay_seconds: float) -> JobStatus:
    job.status = JobStatus.QUEUED
    job.available_at = database.now(session) + timedelta(seconds=delay_seconds)
    job.queue_deadline = deadline(job.available_at, job.max_queue_seconds)
    session.flush()
    return job.status


def _end(session: Session, job: Job, status: JobStatus, data: dict[str, Any] | None = None) -> JobStatus:
    job.status = status
    job.finished_at = database.now(session)
    session.flush()
    events.append(session, job.id, f"job_{status.value}", data or {}, attempt=job.attempts_made)
    return status


def deadline(start: datetime, max_queue_seconds: int | None) -> datetime | None:
    """When a job that waits since `start` expires; None: never."""
    return None if max_queue_seconds is None else start + timedelta(seconds=max_queue_seconds)


def stores_lost(session: Session, job_id: str) -> int:
    """How many attempts in a row ended for want of their store, up to the last one that ended."""
    of_job = Attempt.job_id == job_id
    otherwise = select(func.max(Attempt.number)).where(of_job, Attempt.outcome != AttemptOutcome.STORE_LOST)
    lost = select(func.count()).where(
        of_job,
        Attempt.outcome == AttemptOutcome.STORE_LOST,
        Attempt.number > func.coalesce(otherwise.scalar_subquery(), 0),
    )
    return session.execute(lost).scalar_one()


def store_pause(lost: int) -> float:
    """Seconds before a job is taken again whose store was away or refused, doubling while that lasts. lost:
    how many attempts in a row ended so before."""
    return min(_STORE_PAUSE_MAX_SECONDS, _STORE_PAUSE_SECONDS * 2.0**lost)


def retry_delay(counted: int) -> float:
    """Seconds before the next attempt, doubling with each counted one."""
    return min(_RETRY_DELAY_MAX_SECONDS, _RETRY_DELAY_SECONDS * 2.0 ** (counted - 1))
