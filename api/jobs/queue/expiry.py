"""Jobs whose time has run out: leases that were not renewed, waits longer than max_queue_seconds, and
duplicates whose original is gone. Every worker's reaper calls these functions (worker/housekeeping.py). And
jobs whose workers are known not to run them, which are given back at once."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import ColumnElement, exists, or_, select
from sqlalchemy.orm import Session

from api import database
from api.jobs.ledger import events
from api.jobs.ledger.models import ACTIVE, AttemptOutcome, Job, JobStatus
from api.jobs.queue import deduplication
from api.jobs.queue.attempts import end_counted, end_uncounted

REAPED_AT_ONCE = 50
"""How many jobs one transaction ends at most, so that on SQLite others get to write."""


def has_expired(session: Session) -> bool:
    """Whether any time has run out. Only reads, so on SQLite it keeps nobody from writing."""
    now = database.now(session)
    conditions = (_lost(now), _overdue(now), deduplication.stranded())
    found = (exists(select(Job.id).where(*which)) for which in conditions)
    return bool(session.scalar(select(or_(*found))))


def reap(session: Session) -> int:
    """End leases that ran out: the job is queued again, failed past max_attempts, or cancelled if that was
    asked for. Returns how many jobs changed, at most REAPED_AT_ONCE.

    Harmless when several workers do it at once: each job is locked, and skipped where another holds it.
    """
    lost = _lock(session, *_lost(database.now(session)), limit=REAPED_AT_ONCE)
    message = "The worker stopped renewing its lease: it crashed, or lost the database."
    for job in lost:
        end_counted(
            session,
            job.id,
            job.attempts_made,
            AttemptOutcome.LEASE_LOST,
            "lease_lost",
            message,
            retryable=True,
        )
    return len(lost)


def expire(session: Session) -> int:
    """End waits longer than max_queue_seconds, and see to duplicates whose original is no longer in flight.
    As harmless as `reap`. Returns how many jobs changed, at most REAPED_AT_ONCE."""
    expired = _expire(session, REAPED_AT_ONCE)
    return expired + deduplication.resolve_stranded(session, REAPED_AT_ONCE - expired)


def _expire(session: Session, limit: int) -> int:
    now = database.now(session)
    overdue = _lock(session, *_overdue(now), limit=limit)
    for job in overdue:
        job.status = JobStatus.EXPIRED
        job.deduplicated_from = None
        job.finished_at = now
        job.error_code = "max_queue_seconds"
        job.error_message = f"No worker took the job within {job.max_queue_seconds} seconds."
        session.flush()
        events.append(session, job.id, "job_expired", {"code": job.error_code, "message": job.error_message})
    return len(overdue)


def _lost(now: datetime) -> tuple[ColumnElement[bool], ...]:
    """No index has lease_until: there are no more jobs with a lease than workers."""
    return Job.status.in_(ACTIVE), Job.lease_until < now


def _overdue(now: datetime) -> tuple[ColumnElement[bool], ...]:
    return Job.status == JobStatus.QUEUED, Job.queue_deadline <= now, deduplication.waits_for_worker()


def release_all(session: Session) -> int:
    """Give back every held job, not counted: for the embedded mode's start, when no worker can be alive."""
    return _release(session)


def release_held(session: Session, worker_id: str) -> int:
    """Give back, not counted, the jobs of a worker that runs none: what it claimed when the database's answer
    was lost, and what it could not end."""
    return _release(session, Job.lease_owner == worker_id)


def _release(session: Session, *conditions: ColumnElement[bool]) -> int:
    held = _lock(session, Job.status.in_(ACTIVE), *conditions)
    for job in held:
        end_uncounted(session, job.id, job.attempts_made, AttemptOutcome.PREEMPTED)
    return len(held)


def _lock(session: Session, *conditions: ColumnElement[bool], limit: int | None = None) -> Sequence[Job]:
    return session.scalars(
        select(Job)
        .where(*conditions)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    ).all()
