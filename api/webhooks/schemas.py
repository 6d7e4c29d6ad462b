"""What the webhooks routes take and answer, and what is sent to webhooks."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from api.webhooks.models import DeliveryStatus, WebhookEvent

_FINAL_EVENTS = [
    WebhookEvent.JOB_SUCCEEDED,
    WebhookEvent.JOB_FAILED,
    WebhookEvent.JOB_CANCELLED,
    WebhookEvent.JOB_EXPIRED,
]


class WebhookCreate(BaseModel):
    """A receiver of messages about the project's jobs."""

    model_config = ConfigDict(extra="forbid")

    url: str = Field(
        min_length=1,
        max_length=2000,
        description="https, to a host with public addresses, unless the server's settings allow the host.",
        examples=["https://example.com/bitmill"],
    )
    events: Annotated[list[WebhookEvent], Field(min_length=1, max_length=len(WebhookEvent))] = Field(
        default=_FINAL_EVENTS, description="Events to get messages about; by default the four that end a job."
    )
    all_jobs: bool = Field(
        default=True,
        strict=True,
        description="false: gets messages only about jobs that name this webhook as their `callback`.",
    )
    description: str | None = Field(default=None, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")


class WebhookRead(BaseModel):
    """A receiver of messages. Its secret is not shown again."""

    model_config = ConfigDict(from_attributes=True)

    id: str = Field(examples=["wh_0f3c9a1be27d45608c1f"])
    url: str
    events: list[WebhookEvent]
    all_jobs: bool
    description: str | None
    created_at: datetime
    disabled_at: datetime | None = Field(
        description="When the receiver answered 410, after which it gets nothing."
    )


class WebhookCreated(WebhookRead):
    """A new webhook with the secret that its messages are signed with, which is shown this once."""

    secret: str = Field(description="`whsec_` and base64, as libraries of Standard Webhooks take it.")


class WebhookPage(BaseModel):
    """Webhooks, the newest first. `next_cursor` is null on the last page."""

    items: list[WebhookRead]
    next_cursor: str | None


class DeliveryRead(BaseModel):
    """A message to a webhook. Its id is the header `webhook-id`, the same at every attempt."""

    model_config = ConfigDict(from_attributes=True)

    id: str = Field(examples=["msg_5c20f1d94b7e8a36027b"])
    event: str = Field(description="An event's type, or ping.", examples=["job_succeeded"])
    job_id: str | None
    status: DeliveryStatus
    attempts: int
    next_attempt_at: datetime | None
    last_status_code: int | None = Field(description="What the receiver answered, if it did.")
    last_error: str | None
    created_at: datetime
    delivered_at: datetime | None


class DeliveryPage(BaseModel):
    """Messages, the newest first. `next_cursor` is null on the last page."""

    items: list[DeliveryRead]
    next_cursor: str | None


class PingData(BaseModel):
    """Which webhook was pinged."""

    webhook: str


class PingMessage(BaseModel):
    """The body of a ping."""

    type: str
    timestamp: datetime
    data: PingData
