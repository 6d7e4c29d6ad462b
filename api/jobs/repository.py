"""Queries on jobs, for the HTTP side. The worker's are in leases.py and reaper.py."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import delete, select, tuple_
from sqlalchemy.orm import Session, undefer

from api.jobs.models import Attempt, IdempotencyKey, Job, JobStatus

IDEMPOTENCY_HOURS = 24
_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"


@dataclass(frozen=True)
class JobFilter:
    """Which jobs to list; None: any."""

    status: JobStatus | None = None
    model: str | None = None
    scheme: str | None = None


@dataclass(frozen=True)
class Position:
    """A place in the list of jobs, which is ordered by (created_at, id), the newest first."""

    created_at: datetime
    id: str


def new_job_id(now: datetime) -> str:
    """`job_` and a ULID, which sorts by time: 48 bits of milliseconds and 80 random ones, in base 32."""
    number = int(now.timestamp() * 1000) << 80 | secrets.randbits(80)
    return "job_" + "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


def get(session: Session, project_id: str, job_id: str, *, with_plan: bool = False) -> Job | None:
    """A project's job."""
    query = select(Job).where(Job.id == job_id, Job.project_id == project_id)
    return session.scalars(query.options(undefer(Job.plan)) if with_plan else query).one_or_none()


def get_for_update(session: Session, project_id: str, job_id: str) -> Job | None:
    """A project's job, held until the transaction ends."""
    return session.scalars(
        select(Job).where(Job.id == job_id, Job.project_id == project_id).with_for_update()
    ).one_or_none()


def list_page(
    session: Session, project_id: str, wanted: JobFilter, after: Position | None, limit: int
) -> Sequence[Job]:
    """At most `limit` jobs after a position."""
    query = select(Job).where(Job.project_id == project_id)
    if wanted.status is not None:
        query = query.where(Job.status == wanted.status)
    if wanted.model is not None:
        query = query.where(Job.model == wanted.model)
    if wanted.scheme is not None:
        query = query.where(Job.scheme == wanted.scheme)
    if after is not None:
        query = query.where(tuple_(Job.created_at, Job.id) < (after.created_at, after.id))
    return session.scalars(query.order_by(Job.created_at.desc(), Job.id.desc()).limit(limit)).all()


def attempts(session: Session, job_id: str) -> Sequence[Attempt]:
    """A job's attempts, in order."""
    return session.scalars(select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.number)).all()


def find_idempotency_key(
    session: Session, project_id: str, route: str, key: str, now: datetime
) -> IdempotencyKey | None:
    """The key's row, if it is not older than 24 hours."""
    return session.scalars(
        select(IdempotencyKey).where(
            IdempotencyKey.project_id == project_id,
            IdempotencyKey.route == route,
            IdempotencyKey.key == key,
            IdempotencyKey.created_at >= now - timedelta(hours=IDEMPOTENCY_HOURS),
        )
    ).one_or_none()


def add_idempotency_key(session: Session, row: IdempotencyKey) -> None:
    """Keep a key; one of the same name that has run out makes room."""
    session.execute(
        delete(IdempotencyKey).where(
            IdempotencyKey.project_id == row.project_id,
            IdempotencyKey.route == row.route,
            IdempotencyKey.key == row.key,
            IdempotencyKey.created_at < row.created_at - timedelta(hours=IDEMPOTENCY_HOURS),
        )
    )
    session.add(row)
    session.flush()
