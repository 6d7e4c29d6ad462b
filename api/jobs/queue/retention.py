"""What is removed after a time: finished layers of jobs that ended long ago, and rows of deleted jobs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from api import database
from api.jobs.ledger.models import RETRYABLE, TERMINAL, Job, JobLayer, StoredPlan
from api.jobs.queue import deduplication


class Ended(NamedTuple):
    """A job that ended. manifest_key: of what it published, if anything."""

    id: str
    manifest_key: str | None


def past_resume(session: Session, days: float, limit: int) -> Sequence[Ended]:
    """At most `limit` jobs that still have finished layers although they ended more than `days` ago."""
    cutoff = database.now(session) - timedelta(days=days)
    old = select(JobLayer.job_id).where(JobLayer.at < cutoff)  # has an index; layers come before the end
    query = (
        select(Job.id, Job.manifest_key)
        .where(Job.id.in_(old), Job.status.in_(TERMINAL), Job.finished_at < cutoff)
        .limit(limit)
    )
    return [Ended(*row) for row in session.execute(query)]


def forget_layers(session: Session, job_id: str) -> None:
    """Forget the finished layers of a job, unless it was retried meanwhile. A retry begins at layer 0."""
    session.execute(update(Job).where(Job.id == job_id, Job.status.in_(RETRYABLE)).values(layers_done=0))
    ended = select(Job.id).where(Job.id == job_id, Job.status.in_(TERMINAL))
    session.execute(delete(JobLayer).where(JobLayer.job_id.in_(ended)))


def deleted(session: Session, limit: int) -> Sequence[str]:
    """Ids of jobs that were deleted and still have a row; not of those whose files others have as well."""
    query = select(Job.id).where(Job.deleted_at.is_not(None), ~deduplication.shares_files())
    return session.scalars(query.order_by(Job.deleted_at).limit(limit)).all()


def remove(session: Session, job_id: str) -> None:
    """Remove a deleted job's row, with its attempts, events and layers, and its plan if no other job has it.

    A transaction that stores a new job with the same plan has locked the plan's row: this one waits for it,
    and only then looks for jobs with that plan.
    """
    removed = delete(Job).where(Job.id == job_id, Job.deleted_at.is_not(None)).returning(Job.plan_id)
    plan_id = session.execute(removed).scalar_one_or_none()
    if plan_id is None:
        return
    session.execute(select(StoredPlan.id).where(StoredPlan.id == plan_id).with_for_update())
    unused = ~select(Job.id).where(Job.plan_id == StoredPlan.id).exists()
    session.execute(delete(StoredPlan).where(StoredPlan.id == plan_id, unused))
