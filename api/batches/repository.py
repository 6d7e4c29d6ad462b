"""Queries on batches and on their jobs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Select, func, select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session, undefer

from api.cursors import Position
from api.jobs.ledger.models import CANCELLABLE, Batch, Job, JobStatus


def get(
    session: Session, project_id: str, batch_id: str, *, deferred: Sequence[InstrumentedAttribute[Any]] = ()
) -> Batch | None:
    """A project's batch, with these of the columns that are left out otherwise."""
    query = select(Batch).where(Batch.id == batch_id, Batch.project_id == project_id)
    return session.scalars(query.options(*map(undefer, deferred))).one_or_none()


def list_page(session: Session, project_id: str, after: Position | None, limit: int) -> Sequence[Batch]:
    """At most `limit` batches after a position, the newest first."""
    query = select(Batch).where(Batch.project_id == project_id)
    if after is not None:
        query = query.where(tuple_(Batch.created_at, Batch.id) < (after.created_at, after.id))
    return session.scalars(query.order_by(Batch.created_at.desc(), Batch.id.desc()).limit(limit)).all()


def counting(batch_ids: Iterable[str]) -> Select[str | None, JobStatus, int]:
    """How many jobs of each of these batches there are, by status."""
    return (
        select(Job.batch_id, Job.status, func.count())
        .where(Job.batch_id.in_(batch_ids), Job.deleted_at.is_(None))
        .group_by(Job.batch_id, Job.status)
    )


def count_jobs(session: Session, batch_ids: Iterable[str]) -> Mapping[str, Mapping[JobStatus, int]]:
    """Batch -> status -> how many jobs."""
    counts: dict[str, dict[JobStatus, int]] = {batch_id: {} for batch_id in batch_ids}
    for batch_id, status, count in session.execute(counting(counts)):
        if batch_id is not None:
            counts[batch_id][status] = count
    return counts


def job_ids(session: Session, batch_id: str, after: int, limit: int) -> Sequence[tuple[int, str]]:
    """Index and id of at most `limit` jobs of a batch behind an index, in order."""
    query = (
        select(Job.batch_index, Job.id)
        .where(Job.batch_id == batch_id, Job.batch_index > after, Job.deleted_at.is_(None))
        .order_by(Job.batch_index)
        .limit(limit)
    )
    return [(index, job_id) for index, job_id in session.execute(query) if index is not None]


def cancellable_for_update(session: Session, batch_id: str) -> Sequence[Job]:
    """The jobs of a batch that can be cancelled, held until the transaction ends."""
    return session.scalars(
        select(Job)
        .where(Job.batch_id == batch_id, Job.status.in_(CANCELLABLE))
        .order_by(Job.id)
        .with_for_update()
    ).all()
