"""How an attempt ends, and what becomes of its job: retried with backoff, or ended. Used by the worker that
holds the lease and by the reaper."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api import database
from api.jobs.ledger import events
from api.jobs.ledger.models import POSTPONED, Attempt, AttemptOutcome, Job, JobStatus

_BACKOFF_SECONDS = 2.0
_BACKOFF_MAX_SECONDS = 60.0
_POSTPONED_SECONDS = 60.0
_POSTPONED_MAX_SECONDS = 900.0


@dataclass(frozen=True)
class AttemptFacts:
    """What the supervisor saw of the engine's process; None where it saw nothing."""

    exit_signal: int | None = None
    peak_host_bytes: int | None = None
    peak_gpu_bytes: int | None = None


NO_FACTS = AttemptFacts()


def end_attempt(
    session: Session,
    job_id: str,
    number: int,
    outcome: AttemptOutcome,
    code: str | None = None,
    message: str | None = None,
    facts: AttemptFacts = NO_FACTS,
) -> None:
    """Close an attempt's row and store the event `attempt_ended`. The caller holds the job's row."""
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


def end_uncounted(
    session: Session,
    job_id: str,
    number: int,
    outcome: AttemptOutcome,
    facts: AttemptFacts = NO_FACTS,
    *,
    why: tuple[str, str] | None = None,
    delay_seconds: float = 0,
) -> JobStatus:
    """End an attempt that does not count toward max_attempts: the job is queued again, or cancelled where
    that was asked for.

    why: code and message of the attempt. The caller holds the job's row.
    """
    code, message = why or (None, None)
    end_attempt(session, job_id, number, outcome, code, message, facts)
    job = release_lease(session, job_id)
    if job.status == JobStatus.CANCELLING:
        return _end(session, job, JobStatus.CANCELLED)
    return _requeue(session, job, delay_seconds)


def end_counted(
    session: Session,
    job_id: str,
    number: int,
    outcome: AttemptOutcome,
    code: str,
    message: str,
    facts: AttemptFacts = NO_FACTS,
    *,
    retryable: bool,
) -> JobStatus:
    """End a failed attempt that counts toward max_attempts: the job is queued again while attempts are left,
    else it has failed.

    A job that is being cancelled ends cancelled. The caller holds the job's row.
    """
    end_attempt(session, job_id, number, outcome, code, message, facts)
    job = release_lease(session, job_id)
    job.attempts_counted += 1
    if job.status == JobStatus.CANCELLING:
        return _end(session, job, JobStatus.CANCELLED)
    if retryable and job.attempts_counted < job.max_attempts:
        return _requeue(session, job, retry_backoff(job.attempts_counted))
    job.error_code, job.error_message = code, message
    return _end(session, job, JobStatus.FAILED, {"code": code, "message": message})


def release_lease(session: Session, job_id: str) -> Job:
    """End a job's lease. The fencing token rises, so a worker that still has the old one can no longer
    write."""
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


def postponed_in_a_row(session: Session, job_id: str) -> int:
    """How many attempts in a row were postponed, up to the last one that ended."""
    of_job = Attempt.job_id == job_id
    otherwise = select(func.max(Attempt.number)).where(of_job, Attempt.outcome.not_in(POSTPONED))
    lost = select(func.count()).where(
        of_job,
        Attempt.outcome.in_(POSTPONED),
        Attempt.number > func.coalesce(otherwise.scalar_subquery(), 0),
    )
    return session.execute(lost).scalar_one()


def postponed_backoff(before: int) -> float:
    """Seconds before a postponed job may be claimed again, doubling each time. before: how many attempts in a
    row ended so before."""
    return min(_POSTPONED_MAX_SECONDS, _POSTPONED_SECONDS * 2.0**before)


def retry_backoff(counted: int) -> float:
    """Seconds before the next attempt, doubling with each counted one."""
    return min(_BACKOFF_MAX_SECONDS, _BACKOFF_SECONDS * 2.0 ** (counted - 1))
