"""Queries over all projects. Each is answered from an index, without reading rows."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api.jobs.ledger.models import ACTIVE, TERMINAL, Attempt, AttemptOutcome, Job, JobStatus
from api.webhooks.models import Delivery, DeliveryStatus


class Held(NamedTuple):
    """Jobs of one device class in one state that is not their end. since: when the first could be claimed."""

    status: JobStatus
    device_class: str
    jobs: int
    since: datetime


class Ended(NamedTuple):
    """Jobs of one device class that ended alike."""

    status: JobStatus
    device_class: str
    jobs: int


class Deliveries(NamedTuple):
    """Messages to webhooks in one state. due: of those that are pending, how many should be on their way."""

    status: DeliveryStatus
    messages: int
    due: int


def jobs_held(session: Session) -> Sequence[Held]:
    """Jobs that wait and run."""
    query = (
        select(Job.status, Job.device_class, func.count(), func.min(Job.available_at))
        .where(Job.status.in_((JobStatus.QUEUED, *ACTIVE)))
        .group_by(Job.status, Job.device_class)
    )
    return [Held(*row) for row in session.execute(query)]


def jobs_ended(session: Session, since: datetime) -> Sequence[Ended]:
    """Jobs that ended since then."""
    query = (
        select(Job.status, Job.device_class, func.count())
        .where(Job.finished_at >= since, Job.status.in_(TERMINAL))
        .group_by(Job.status, Job.device_class)
    )
    return [Ended(*row) for row in session.execute(query)]


def attempts_ended(session: Session, since: datetime) -> dict[AttemptOutcome, int]:
    """How attempts ended since then."""
    query = (
        select(Attempt.outcome, func.count())
        .where(Attempt.ended_at >= since, Attempt.outcome.is_not(None))
        .group_by(Attempt.outcome)
    )
    return {outcome: count for outcome, count in session.execute(query) if outcome is not None}


def deliveries(session: Session, now: datetime) -> Sequence[Deliveries]:
    """Messages that have not arrived."""
    query = (
        select(Delivery.status, func.count(), func.count().filter(Delivery.next_attempt_at <= now))
        .where(Delivery.status.in_((DeliveryStatus.PENDING, DeliveryStatus.FAILED)))
        .group_by(Delivery.status)
    )
    return [Deliveries(*row) for row in session.execute(query)]
