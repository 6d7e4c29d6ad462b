"""What happens to jobs that nobody looks after: leases that ran out, waits that were too long."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from api import database
from api.jobs import events
from api.jobs.attempts import count_failure, give_back
from api.jobs.models import ACTIVE, AttemptOutcome, Job, JobStatus


def reap(session: Session) -> int:
    """End leases that ran out: the job is queued again, failed past max_attempts, or cancelled if that was
    asked for. Returns how many jobs changed.

    Harmless when several workers do it at once: each job is locked, and skipped where another holds it.
    """
    lost = _lock(session, Job.status.in_(ACTIVE), Job.lease_until < database.now(session))
    message = "The worker stopped renewing its lease: it crashed, or lost the database."
    for job in lost:
        count_failure(
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
    """End waits longer than max_queue_seconds, as harmlessly. Returns how many jobs changed."""
    now = database.now(session)
    overdue = _lock(session, Job.status == JobStatus.QUEUED, Job.queue_deadline <= now)
    for job in overdue:
        job.status = JobStatus.EXPIRED
        job.finished_at = now
        job.error_code = "max_queue_seconds"
        job.error_message = f"No worker took the job within {job.max_queue_seconds} seconds."
        session.flush()
        events.append(session, job.id, "job_expired", {"code": job.error_code, "message": job.error_message})
    return len(overdue)


def release_all(session: Session) -> int:
    """Give back every held job, not counted: for the embedded mode's start, when no worker can be alive."""
    return _release(session)


def release_held(session: Session, worker_id: str) -> int:
    """Give back what a worker holds that runs nothing, not counted: what it claimed when the database's
    answer was lost, and what it could not end."""
    return _release(session, Job.lease_owner == worker_id)


def _release(session: Session, *conditions: ColumnElement[bool]) -> int:
    held = _lock(session, Job.status.in_(ACTIVE), *conditions)
    for job in held:
        give_back(session, job.id, job.attempts_made, AttemptOutcome.PREEMPTED)
    return len(held)


def _lock(session: Session, *conditions: ColumnElement[bool]) -> Sequence[Job]:
    return session.scalars(
        select(Job)
        .where(*conditions)
        .order_by(Job.id)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    ).all()
