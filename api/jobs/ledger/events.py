"""A job's events. An event takes its seq from the job's row, so there are no gaps. Messages to webhooks are
written in the same transaction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import Session

from api import database
from api.jobs.ledger.models import Job, JobEvent
from api.jobs.ledger.views import JobMessage
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

    Change the job's row first: a message to a webhook shows the job as it is now.
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
        _notify_webhooks(session, [job_id], type, at)
    return seq


def numbered(job: Job, events: Iterable[tuple[str, dict[str, Any]]], at: datetime) -> list[JobEvent]:
    """The next events of a job whose row the caller holds, or has yet to store. They are not stored: see
    `store`.

    events: type and data of each. Counts event_seq on in the object, so that many events need no query each.
    """
    added = []
    for type, data in events:
        job.event_seq += 1
        added.append(JobEvent(job_id=job.id, seq=job.event_seq, at=at, type=type, data=data))
    return added


def store(session: Session, events: Sequence[JobEvent]) -> None:
    """Store events that `numbered` made, of jobs of one project that are stored, and write the messages to
    webhooks."""
    session.add_all(events)
    session.flush()
    for type in dict.fromkeys(event.type for event in events):
        _notify_webhooks(
            session, [event.job_id for event in events if event.type == type], type, events[0].at
        )


def _notify_webhooks(session: Session, job_ids: Sequence[str], type: str, at: datetime) -> None:
    """Write messages about these jobs of one project to the webhooks that want this event."""
    project = select(Job.project_id).where(Job.id == job_ids[0]).scalar_subquery()
    jobs = Job.id.in_(job_ids)
    webhooks = outbox.receivers(session, type, project, select(Job.callback).where(jobs))
    if not webhooks:
        return
    for job in session.scalars(select(Job).where(jobs).execution_options(populate_existing=True)):
        body = JobMessage.of(type, at, job).model_dump_json()
        outbox.announce(session, webhooks, type, at, job_id=job.id, callback=job.callback, body=body)
    session.flush()


def page(session: Session, job_id: str, since: int, limit: int) -> Sequence[JobEvent]:
    """At most `limit` events after seq `since`, in order."""
    return session.scalars(
        select(JobEvent)
        .where(JobEvent.job_id == job_id, JobEvent.seq > since)
        .order_by(JobEvent.seq)
        .limit(limit)
    ).all()
