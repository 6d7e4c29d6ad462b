"""Queries on webhooks and their log, for the HTTP side. The sender's are in outbox.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, select, tuple_
from sqlalchemy.orm import Session

from api.cursors import Position
from api.webhooks.models import Delivery, DeliveryStatus, Webhook


@dataclass(frozen=True)
class DeliveryFilter:
    """Which messages to list; None: any."""

    status: DeliveryStatus | None = None
    job_id: str | None = None


def get(session: Session, project_id: str, webhook_id: str) -> Webhook | None:
    """A project's webhook."""
    query = select(Webhook).where(Webhook.id == webhook_id, Webhook.project_id == project_id)
    return session.scalars(query).one_or_none()


def list_page(session: Session, project_id: str, after: Position | None, limit: int) -> Sequence[Webhook]:
    """At most `limit` of a project's webhooks after a position, the newest first."""
    query = select(Webhook).where(Webhook.project_id == project_id)
    if after is not None:
        query = query.where(tuple_(Webhook.created_at, Webhook.id) < (after.created_at, after.id))
    return session.scalars(query.order_by(Webhook.created_at.desc(), Webhook.id.desc()).limit(limit)).all()


def remove(session: Session, project_id: str, webhook_id: str) -> bool:
    """Remove a project's webhook with its log. Whether there was one."""
    query = delete(Webhook).where(Webhook.id == webhook_id, Webhook.project_id == project_id)
    return session.execute(query.returning(Webhook.id)).one_or_none() is not None


def deliveries(
    session: Session, webhook_id: str, filters: DeliveryFilter, after: Position | None, limit: int
) -> Sequence[Delivery]:
    """At most `limit` messages to a webhook after a position, the newest first."""
    query = select(Delivery).where(Delivery.webhook_id == webhook_id)
    if filters.status is not None:
        query = query.where(Delivery.status == filters.status)
    if filters.job_id is not None:
        query = query.where(Delivery.job_id == filters.job_id)
    if after is not None:
        query = query.where(tuple_(Delivery.created_at, Delivery.id) < (after.created_at, after.id))
    return session.scalars(query.order_by(Delivery.created_at.desc(), Delivery.id.desc()).limit(limit)).all()


def delivery_for_update(session: Session, webhook_id: str, delivery_id: str) -> Delivery | None:
    """A message to a webhook, held until the transaction ends."""
    query = select(Delivery).where(Delivery.id == delivery_id, Delivery.webhook_id == webhook_id)
    return session.scalars(query.with_for_update()).one_or_none()
