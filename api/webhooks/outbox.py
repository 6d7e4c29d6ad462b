"""Messages to webhooks: written in the transaction of the change, claimed by a sender, settled by the answer.

    event of a job ─▶ announce ─▶ pending, due at once ─▶ claim ─▶ settle ─▶ delivered
                                        ▲                            ├─────▶ failed, after the last attempt
                                        └────── due later ◀──────────┘

A message whose sender dies is due again when its claim runs out, so it may arrive twice, but is never lost;
receivers tell by its id. All functions write in the caller's transaction and never commit. Times are the
database's.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Any

from sqlalchemy import ColumnElement, Select, delete, exists, or_, select, update
from sqlalchemy.orm import Session, undefer

from api import database
from api.webhooks.models import Delivery, DeliveryStatus, Webhook, WebhookEvent

CLAIM_SECONDS = 60.0
"""After which another sender may take a message; longer than an attempt takes."""
RETRY_SECONDS = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""Between attempts, as Standard Webhooks proposes; the message fails with the attempt after the last."""
_JITTER = 0.2
_EVENTS = frozenset(WebhookEvent)
DISABLED = "The webhook is disabled: its receiver answered 410."


@dataclass(frozen=True)
class Message:
    """A claimed message, with all that sending it takes. attempt: the number of this attempt, from 1."""

    id: str
    webhook_id: str
    attempt: int
    at: datetime
    url: str
    secret: str = field(repr=False)
    body: str = field(repr=False)


@dataclass(frozen=True)
class Answer:
    """What came of an attempt. status_code: None where the receiver did not answer; error: why not."""

    status_code: int | None = None
    error: str | None = None


def receivers(
    session: Session, event: str, project_id: ColumnElement[str], callbacks: Select[str | None]
) -> Sequence[Webhook]:
    """The webhooks of a project that get messages of this event: those for all jobs, and those that jobs name
    as their callback.

    project_id, callbacks: SQL, so that a job whose project has no webhook costs one query. The rows are kept
    from being deleted until the messages exist: a message without a webhook would undo the job's own change.
    """
    if event not in _EVENTS:
        return ()
    found = session.scalars(
        select(Webhook)
        .where(
            Webhook.project_id == project_id,
            Webhook.disabled_at.is_(None),
            or_(Webhook.all_jobs, Webhook.id.in_(callbacks)),
        )
        .order_by(Webhook.id)
        .with_for_update(read=True, key_share=True)
    )
    return [webhook for webhook in found if event in webhook.events]


def announce(
    session: Session,
    webhooks: Sequence[Webhook],
    event: str,
    at: datetime,
    *,
    job_id: str,
    callback: str | None,
    body: str,
) -> None:
    """Write a message about a job to each of these webhooks that is for all jobs, or is its callback. The
    caller flushes."""
    session.add_all(
        _message(webhook, event, body, at, job_id)
        for webhook in webhooks
        if webhook.all_jobs or webhook.id == callback
    )


def add(session: Session, webhook: Webhook, event: str, body: str, at: datetime) -> Delivery:
    """Write a message that is about no job."""
    delivery = _message(webhook, event, body, at, None)
    session.add(delivery)
    session.flush()
    return delivery


def _message(webhook: Webhook, event: str, body: str, at: datetime, job_id: str | None) -> Delivery:
    """One message, due at once."""
    return Delivery(
        id=f"msg_{secrets.token_hex(10)}",
        webhook_id=webhook.id,
        job_id=job_id,
        event=event,
        body=body,
        status=DeliveryStatus.PENDING,
        attempts=0,
        next_attempt_at=at,
        created_at=at,
    )


def is_due(session: Session, *, busy: Collection[str] = ()) -> bool:
    """Whether there is a message to `claim`. Only reads, so it holds up nobody on SQLite."""
    due = select(Delivery.id).where(*_due(database.now(session), busy))
    return bool(session.scalar(select(exists(due))))


def claim(session: Session, *, busy: Collection[str] = ()) -> Message | None:
    """Take the message that is due longest, but for those to `busy` webhooks; None without one."""
    now = database.now(session)
    due = (
        select(Delivery.id)
        .where(*_due(now, busy))
        .order_by(Delivery.next_attempt_at, Delivery.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    claimed = session.execute(
        update(Delivery)
        .where(Delivery.id == due, Delivery.status == DeliveryStatus.PENDING)
        .values(attempts=Delivery.attempts + 1, next_attempt_at=now + timedelta(seconds=CLAIM_SECONDS))
        .returning(Delivery.id)
        .execution_options(synchronize_session=False)
    ).scalar_one_or_none()
    if claimed is None:
        return None
    delivery = session.get_one(Delivery, claimed, options=[undefer(Delivery.body)], populate_existing=True)
    webhook = session.get_one(Webhook, delivery.webhook_id)
    return Message(
        delivery.id, webhook.id, delivery.attempts, now, webhook.url, webhook.secret, delivery.body
    )


def settle(session: Session, message: Message, answer: Answer) -> None:
    """Write what came of an attempt, unless another was begun since. 410 disables the webhook."""
    now = database.now(session)
    gone = answer.status_code == HTTPStatus.GONE
    if gone:
        session.execute(update(Webhook).where(Webhook.id == message.webhook_id).values(disabled_at=now))
    _update_pending(
        session,
        Delivery.id == message.id,
        Delivery.attempts == message.attempt,
        last_status_code=answer.status_code,
        **_settled(message.attempt, answer, now),
    )
    if gone:
        failed = {"status": DeliveryStatus.FAILED, "next_attempt_at": None, "last_error": DISABLED}
        _update_pending(session, Delivery.webhook_id == message.webhook_id, **failed)


def forget(session: Session, days: float, limit: int) -> int:
    """Remove at most `limit` messages older than that, but for those that are still to be sent. Returns how
    many."""
    cutoff = database.now(session) - timedelta(days=days)
    old = select(Delivery.id).where(Delivery.created_at < cutoff, Delivery.status != DeliveryStatus.PENDING)
    removed = delete(Delivery).where(Delivery.id.in_(old.limit(limit))).returning(Delivery.id)
    return len(session.execute(removed).all())


def _due(now: datetime, busy: Collection[str]) -> tuple[ColumnElement[bool], ...]:
    return (
        Delivery.status == DeliveryStatus.PENDING,
        Delivery.next_attempt_at <= now,
        Delivery.webhook_id.not_in(busy),
    )


def _settled(attempt: int, answer: Answer, now: datetime) -> dict[str, Any]:
    """What becomes of a message's columns."""
    status = answer.status_code
    if status is not None and 200 <= status < 300:
        return {
            "status": DeliveryStatus.DELIVERED,
            "delivered_at": now,
            "next_attempt_at": None,
            "last_error": None,
        }
    error = answer.error or f"The receiver answered {status}."
    if status == HTTPStatus.GONE or attempt > len(RETRY_SECONDS):
        return {"status": DeliveryStatus.FAILED, "next_attempt_at": None, "last_error": error}
    delay = RETRY_SECONDS[attempt - 1] * random.uniform(1, 1 + _JITTER)
    return {"next_attempt_at": now + timedelta(seconds=delay), "last_error": error}


def _update_pending(session: Session, *which: ColumnElement[bool], **values: Any) -> None:
    session.execute(
        update(Delivery)
        .where(Delivery.status == DeliveryStatus.PENDING, *which)
        .values(**values)
        .execution_options(synchronize_session=False)
    )
