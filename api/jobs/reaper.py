"""What happens to jobs that nobody looks after: leases that ran out, waits that were too long."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from api import database
from api.jobs import events, twins
from api.jobs.attempts import count_failure, give_back
from api.jobs.models import ACTIVE, AttemptOutcome, Job, JobStatus


def reap(session: Session) -> int:
    """End what ran out: a lost lease (queued again, failed past max_attempts, or cancelled if that was asked
    for), a wait longer than max_queue_seconds (expired), and a wait for a twin that is no longer in flight.
    Returns how many jobs changed.

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
    return len(lost) + _expire(session) + twins.settle_rest(session)


def release_all(session: Session) -> int:
    """Give back every held job, not counted: for the embedded mode's start, when no worker can be alive."""
    held = _lock(session, Job.status.in_(ACTIVE))
    for job in held:
        give_back(session, job.id, job.attempts_made, AttemptOutcome.PREEMPTED)
    return len(held)


def _expire(session: Session) -> int:
    now = database.now(session)
    waits = (Job.status == JobStatus.QUEUED, ~twins.waits_for_running())
    overdue = _lock(session, *waits, Job.queue_deadline <= now)
    for job in overdue:
        job.status = JobStatus.EXPIRED
        job.deduplicated_from = None
        job.finished_at = now
        job.error_code = "max_queue_seconds"
        job.error_message = f"No worker took the job within {job.max_queue_seconds} seconds."
        session.flush()
        events.append(session, job.id, "job_expired", {"code": job.error_code, "message": job.error_message})
    return len(overdue)


def _lock(session: Session, *conditions: ColumnElement[bool]) -> Sequence[Job]:
    return session.scalars(
        select(Job)
        .where(*conditions)
        .order_by(Job.id)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    ).all()
