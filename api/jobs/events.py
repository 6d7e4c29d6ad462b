"""A job's events. An event takes its seq from the job's row, so there are no gaps. Webhooks are told
in the same transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import Session

from api import database
from api.jobs.models import Job, JobEvent
from api.webhooks import outbox


def append(
    session: Session,
    job_id: str,
    type: str,
    data: dict[str, Any],
    *,
    attempt: int | None = None,
    where: Sequence[ColumnElement[bool]] = (),
) -> int | None:
    """Add an event and return its seq; None, and nothing is written, where the job's row fails `where`.

    The job's row must be by now what the event made of it: that is what webhooks are told.
    """
    seq = session.execute(
        update(Job)
        .where(Job.id == job_id, *where)
        .values(event_seq=Job.event_seq + 1)
        .returning(Job.event_seq)
        .execution_options(synchronize_session="fetch")
    ).scalar_one_or_none()
    if seq is not None:
        at = database.now(session)
        session.add(JobEvent(job_id=job_id, seq=seq, at=at, attempt=attempt, type=type, data=data))
        session.flush()
        outbox.announce(session, job_id, type, at)
    return seq


def page(session: Session, job_id: str, since: int, limit: int) -> Sequence[JobEvent]:
    """At most `limit` events after seq `since`, in order."""
    return session.scalars(
        select(JobEvent)
        .where(JobEvent.job_id == job_id, JobEvent.seq > since)
        .order_by(JobEvent.seq)
        .limit(limit)
    ).all()
