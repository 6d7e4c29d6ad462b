"""Queries on jobs that any room may make. Those that decide who runs what are in the queue."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    bindparam,
    case,
    delete,
    exists,
    func,
    select,
    tuple_,
    type_coerce,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import InstrumentedAttribute, Session, undefer

from api import database
from api.cursors import Position
from api.database import Columns
from api.jobs.ledger.models import ACTIVE, POSTPONED, Attempt, IdempotencyKey, Job, JobStatus, StoredPlan

IDEMPOTENCY_HOURS = 24
SHOWN = (
    *("id", "name", "labels", "priority", "status", "phase"),
    *("layers_done", "layers_total", "model", "dataset_label", "scheme", "method"),
    *("recipe", "calibration", "evaluation", "quality_gate", "device_class", "max_runtime_seconds"),
    *("max_queue_seconds", "callback", "output", "attempts_made", "event_seq", "created_at"),
    *("started_at", "finished_at", "error_code", "error_message", "batch_id", "batch_index"),
    "deduplicated_from",
)
"""The columns that a job is shown by (views.py)."""
_NOT_SHOWN = ("job_id", "token")  # of an attempt


@dataclass(frozen=True)
class JobFilter:
    """Which jobs to list; None: any."""

    status: JobStatus | None = None
    model: str | None = None
    scheme: str | None = None
    method: str | None = None
    labels: Sequence[tuple[str, str]] = ()
    created_after: datetime | None = None
    created_before: datetime | None = None
    batch: str | None = None


class Version(NamedTuple):
    """The columns of a job that change whenever its answer does, and what it needs of a worker."""

    event_seq: int
    layers_done: int
    status: JobStatus
    device_class: str
    required_host_bytes: int
    required_gpu_bytes: int
    deduplicated_from: str | None
    attempts_made: int


class Postponed(NamedTuple):
    """Why the last attempt was given back, and when the next one may begin."""

    error_code: str | None
    error_message: str | None
    available_at: datetime


class QueueDepth(NamedTuple):
    """Jobs of one device class in one state; oldest: when the first of them was submitted."""

    device_class: str
    status: JobStatus
    jobs: int
    oldest: datetime


class JobOrder(StrEnum):
    """By (created_at, id)."""

    NEWEST = "-created_at"
    OLDEST = "created_at"


def get(
    session: Session, project_id: str, job_id: str, *, deferred: Sequence[InstrumentedAttribute[Any]] = ()
) -> Job | None:
    """A project's job, with these of the columns that are left out otherwise."""
    query = select(Job).where(*_is(project_id, job_id))
    return session.scalars(query.options(*map(undefer, deferred))).one_or_none()


def keep_plans(session: Session, documents: Mapping[str, str]) -> None:
    """Store plans by their SHA-256, and lock those that are stored already against removal until this
    transaction ends. In sorted order, so that two transactions with the same plans cannot deadlock."""
    if not documents:
        return
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    keeping = dialect.insert(StoredPlan)
    holding = keeping.on_conflict_do_update(index_elements=["id"], set_={"id": keeping.excluded.id})
    session.execute(holding, [{"id": id, "document": documents[id]} for id in sorted(documents)])


def get_for_update(session: Session, project_id: str, job_id: str) -> Job | None:
    """A project's job, held until the transaction ends."""
    return session.scalars(select(Job).where(*_is(project_id, job_id)).with_for_update()).one_or_none()


def get_with_attempts(session: Session, project_id: str, job_id: str) -> Sequence[Columns]:
    """A project's job to be shown, by one statement: a row for each attempt, in order, or one for none.

    Each has what is shown of the job, and of the attempt under `attempt_` and the column's name; the first
    has the plan, as JSON, in `plan_text`.
    """
    return session.execute(_WHOLE, {"project": project_id, "job": job_id}).all()


def version(session: Session, project_id: str, job_id: str) -> Version | None:
    """The version of a project's job."""
    query = select(*(getattr(Job, name) for name in Version._fields))
    row = session.execute(query.where(*_is(project_id, job_id))).one_or_none()
    return None if row is None else Version(*row)


def postponed(session: Session, job_id: str) -> Postponed | None:
    """Why a job waits whose last attempt was postponed; None once it may be claimed again."""
    query = (
        select(Attempt.error_code, Attempt.error_message, Job.available_at)
        .join(Job, (Job.id == Attempt.job_id) & (Job.attempts_made == Attempt.number))
        .where(
            Job.id == job_id,
            Job.available_at > database.Now(),
            Attempt.outcome.in_(POSTPONED),
        )
    )
    row = session.execute(query).one_or_none()
    return None if row is None else Postponed(*row)


def queue_depths(session: Session) -> Sequence[QueueDepth]:
    """How many jobs of all projects wait for a worker and run, by device class."""
    query = (
        select(Job.device_class, Job.status, func.count(), func.min(Job.created_at))
        .where(Job.status.in_((JobStatus.QUEUED, *ACTIVE)), Job.deduplicated_from.is_(None))
        .group_by(Job.device_class, Job.status)
    )
    return [QueueDepth(*row) for row in session.execute(query)]


def count(session: Session, project_id: str, statuses: Iterable[JobStatus]) -> int:
    """How many of a project's jobs are in one of these states."""
    query = select(func.count()).where(Job.project_id == project_id, Job.status.in_(statuses))
    return session.execute(query).scalar_one()


def event_seqs(session: Session, job_ids: Iterable[str]) -> dict[str, int]:
    """The last seq of each of these jobs that exists."""
    rows = session.execute(select(Job.id, Job.event_seq).where(Job.id.in_(job_ids), Job.deleted_at.is_(None)))
    return {row.id: row.event_seq for row in rows}


def list_page(
    session: Session,
    project_id: str,
    filters: JobFilter,
    order: JobOrder,
    after: Position | None,
    limit: int,
) -> Sequence[Columns]:
    """The shown columns of at most `limit` jobs after a position."""
    query = select(*_SHOWN).where(_JOBS.project_id == project_id, _JOBS.deleted_at.is_(None))
    for column, value in (
        (_JOBS.status, filters.status),
        (_JOBS.model, filters.model),
        (_JOBS.scheme, filters.scheme),
        (_JOBS.method, filters.method),
        (_JOBS.batch_id, filters.batch),
    ):
        if value is not None:
            query = query.where(column == value)
    for key, value in filters.labels:
        query = query.where(_has_label(session, key, value))
    if filters.created_after is not None:
        query = query.where(_JOBS.created_at > filters.created_after)
    if filters.created_before is not None:
        query = query.where(_JOBS.created_at < filters.created_before)
    place, keys = tuple_(_JOBS.created_at, _JOBS.id), (_JOBS.created_at, _JOBS.id)
    if order == JobOrder.NEWEST:
        query = query.order_by(*(key.desc() for key in keys))
        if after is not None:
            query = query.where(place < (after.created_at, after.id))
    else:
        query = query.order_by(*keys)
        if after is not None:
            query = query.where(place > (after.created_at, after.id))
    return session.execute(query.limit(limit)).all()


def _is(project_id: str, job_id: str) -> tuple[ColumnElement[bool], ...]:
    """The conditions that find a job of a project that is not deleted."""
    return Job.id == job_id, Job.project_id == project_id, Job.deleted_at.is_(None)


# Jobs that are only shown are read as columns of tables: making objects takes several times as long. The
# query of GET /v1/jobs/{job_id} is built once, because building it takes longer than running it.
_JOBS, _PLANS, _OF_ATTEMPTS = Job.__table__.c, StoredPlan.__table__.c, Attempt.__table__.c
_SHOWN = [column for column in _JOBS if column.name in SHOWN or column.name in Version._fields]
_NUMBER = func.coalesce(_OF_ATTEMPTS.number, 1)
_WHOLE = (
    select(
        *_SHOWN,
        case((_NUMBER == 1, _PLANS.document)).label("plan_text"),  # not once for each attempt
        *(column.label(f"attempt_{column.name}") for column in _OF_ATTEMPTS if column.name not in _NOT_SHOWN),
    )
    .join_from(Job.__table__, StoredPlan.__table__)
    .join(Attempt.__table__, _OF_ATTEMPTS.job_id == _JOBS.id, isouter=True)
    .where(_JOBS.id == bindparam("job"), _JOBS.project_id == bindparam("project"), _JOBS.deleted_at.is_(None))
    .order_by(_NUMBER)
)


def _has_label(session: Session, key: str, value: str) -> ColumnElement[bool]:
    if session.get_bind().dialect.name == "postgresql":
        return type_coerce(_JOBS.labels, JSONB).contains({key: value})
    label = func.json_each(_JOBS.labels).table_valued("key", "value")
    return exists(select(label.c.key).where(label.c.key == key, label.c.value == value))


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


def forget_idempotency_keys(session: Session, resource_id: str) -> None:
    """Remove the keys that made a job, so that they can be used again."""
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.resource_id == resource_id))


def forget_old_idempotency_keys(session: Session, limit: int) -> int:
    """Remove at most `limit` keys that have expired. Returns how many."""
    cutoff = database.now(session) - timedelta(hours=IDEMPOTENCY_HOURS)
    name = IdempotencyKey.project_id, IdempotencyKey.route, IdempotencyKey.key
    old = select(*name).where(IdempotencyKey.created_at < cutoff).limit(limit)
    removed = delete(IdempotencyKey).where(tuple_(*name).in_(old)).returning(IdempotencyKey.key)
    return len(session.execute(removed).all())


def add_idempotency_key(session: Session, row: IdempotencyKey) -> None:
    """Store a key, in place of one of the same name that has expired."""
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
