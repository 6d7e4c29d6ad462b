"""Tables: webhooks, and the messages that go to them."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from sqlalchemy import Enum, ForeignKey, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from api.database import Base
from api.projects.models import Project


class WebhookEvent(StrEnum):
    """Events that messages to webhooks are about. There are none about phases, layers and warnings: a job has
    hundreds of those, and its list or stream of events has them all."""

    JOB_QUEUED = "job_queued"
    ATTEMPT_STARTED = "attempt_started"
    JOB_SUCCEEDED = "job_succeeded"
    JOB_FAILED = "job_failed"
    JOB_CANCELLED = "job_cancelled"
    JOB_EXPIRED = "job_expired"


class DeliveryStatus(StrEnum):
    """pending -> delivered | failed; a redelivery makes it pending again."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


class Webhook(Base):
    """An address that gets messages about a project's jobs.

    all_jobs: gets messages about every job of the project; else only about those that name it as their
    callback.
    secret: signs its messages. Kept as it is, since signing needs it; it opens nothing on this server.
    disabled_at: from then on nothing is sent there.
    """

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey(Project.id, ondelete="CASCADE"))
    url: Mapped[str] = mapped_column(Text)
    events: Mapped[list[str]]
    all_jobs: Mapped[bool]
    description: Mapped[str | None] = mapped_column(String(200))
    secret: Mapped[str] = mapped_column(String(100))
    created_at: Mapped[datetime]
    disabled_at: Mapped[datetime | None]

    __table_args__ = (Index("ix_webhooks_list", "project_id", "created_at", "id"),)


class Delivery(Base):
    """One message to one webhook, written with the change that it tells of and sent until it arrives.

    job_id: null for a ping. body: the bytes that are signed and sent, the same at every attempt.
    attempts: how often it was sent; numbers the attempts, so that only the last one may settle it.
    next_attempt_at: when it is due; while a sender has it, when another may take it over; null once settled.
    last_error: why the last attempt failed.
    """

    __tablename__ = "webhook_deliveries"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    webhook_id: Mapped[str] = mapped_column(ForeignKey(Webhook.id, ondelete="CASCADE"))
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    event: Mapped[str] = mapped_column(String(40))
    body: Mapped[str] = mapped_column(Text, deferred=True)
    status: Mapped[DeliveryStatus] = mapped_column(
        Enum(
            DeliveryStatus,
            native_enum=False,
            length=16,
            values_callable=lambda kind: [status.value for status in kind],
        )
    )
    attempts: Mapped[int]
    next_attempt_at: Mapped[datetime | None]
    last_status_code: Mapped[int | None]
    last_error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(index=True)
    delivered_at: Mapped[datetime | None]

    __table_args__ = (
        Index("ix_webhook_deliveries_due", "status", "next_attempt_at"),
        Index("ix_webhook_deliveries_list", "webhook_id", "created_at", "id"),
    )
