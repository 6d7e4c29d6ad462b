"""What can be done with webhooks over HTTP, in the caller's transaction."""

from __future__ import annotations

import secrets
from collections.abc import Collection

from sqlalchemy.orm import Session

from api import database
from api.cursors import Position, next_cursor
from api.errors import Conflict, NotFound, Unprocessable
from api.webhooks import outbox, repository
from api.webhooks.addresses import resolve
from api.webhooks.models import Delivery, DeliveryStatus, Webhook
from api.webhooks.repository import DeliveryFilter
from api.webhooks.schemas import (
    DeliveryPage,
    DeliveryRead,
    PingData,
    PingMessage,
    WebhookCreate,
    WebhookPage,
    WebhookRead,
)
from api.webhooks.signing import new_secret
from compression.errors import Problem

_PING = "ping"
_MAKE_ANOTHER = "Make a new webhook when the receiver is back."


def check_url(url: str, allowed_hosts: Collection[str]) -> None:
    """Refuse an address that messages may not go to. Asks the resolver, so no transaction may be open.

    Raises:
        Unprocessable: `webhook_url_not_allowed`, `webhook_host_not_found`.
    """
    resolve(url, allowed_hosts)


def create(session: Session, project_id: str, body: WebhookCreate) -> Webhook:
    """Store a webhook, whose URL was checked, with a fresh secret."""
    webhook = Webhook(
        id=f"wh_{secrets.token_hex(10)}",
        project_id=project_id,
        url=body.url,
        events=list(dict.fromkeys(body.events)),
        all_jobs=body.all_jobs,
        description=body.description,
        secret=new_secret(),
        created_at=database.now(session),
    )
    session.add(webhook)
    session.flush()
    return webhook


def get_webhook(session: Session, project_id: str, webhook_id: str) -> Webhook:
    """The project's webhook.

    Raises:
        NotFound: `webhook_not_found`, also for another project's.
    """
    webhook = repository.get(session, project_id, webhook_id)
    if webhook is None:
        raise _not_found(webhook_id)
    return webhook


def list_webhooks(session: Session, project_id: str, cursor: str | None, limit: int) -> WebhookPage:
    """A page of webhooks.

    Raises:
        Unprocessable: `bad_cursor`.
    """
    after = None if cursor is None else Position.of_cursor(cursor)
    found = repository.list_page(session, project_id, after, limit + 1)
    items = [WebhookRead.model_validate(webhook) for webhook in found[:limit]]
    return WebhookPage(items=items, next_cursor=next_cursor(found, limit))


def delete(session: Session, project_id: str, webhook_id: str) -> None:
    """Delete a webhook with its log; what was still to be sent is not sent.

    Raises:
        NotFound: `webhook_not_found`.
    """
    if not repository.remove(session, project_id, webhook_id):
        raise _not_found(webhook_id)


def list_deliveries(
    session: Session,
    project_id: str,
    webhook_id: str,
    filters: DeliveryFilter,
    cursor: str | None,
    limit: int,
) -> DeliveryPage:
    """A page of the messages to a webhook.

    Raises:
        NotFound: `webhook_not_found`.
        Unprocessable: `bad_cursor`.
    """
    get_webhook(session, project_id, webhook_id)
    after = None if cursor is None else Position.of_cursor(cursor)
    found = repository.deliveries(session, webhook_id, filters, after, limit + 1)
    items = [DeliveryRead.model_validate(delivery) for delivery in found[:limit]]
    return DeliveryPage(items=items, next_cursor=next_cursor(found, limit))


def ping(session: Session, project_id: str, webhook_id: str) -> Delivery:
    """Write a message that tells of no job.

    Raises:
        NotFound: `webhook_not_found`.
        Conflict: `webhook_disabled`.
    """
    webhook = _enabled(session, project_id, webhook_id)
    now = database.now(session)
    message = PingMessage(type=_PING, timestamp=now, data=PingData(webhook=webhook.id))
    return outbox.add(session, webhook, _PING, message.model_dump_json(), now)


def redeliver(session: Session, project_id: str, webhook_id: str, delivery_id: str) -> Delivery:
    """Let a message be sent again, whatever became of it, with all attempts anew.

    Raises:
        NotFound: `webhook_not_found`, `delivery_not_found`.
        Conflict: `webhook_disabled`.
    """
    webhook = _enabled(session, project_id, webhook_id)
    delivery = repository.delivery_for_update(session, webhook.id, delivery_id)
    if delivery is None:
        raise NotFound("delivery_not_found", f"The webhook has no delivery {delivery_id!r}.")
    delivery.status = DeliveryStatus.PENDING
    delivery.attempts = 0
    delivery.next_attempt_at = database.now(session)
    delivery.delivered_at = None
    session.flush()
    return delivery


def check_callback(session: Session, project_id: str, webhook_id: str | None) -> None:
    """Refuse a job whose callback cannot be called.

    Raises:
        Unprocessable: `callback_not_found`, `webhook_disabled`.
    """
    if webhook_id is None:
        return
    webhook = repository.get(session, project_id, webhook_id)
    if webhook is None:
        message = f"There is no webhook {webhook_id!r}."
        hint = "Make one with POST /v1/webhooks, or leave the callback out."
        raise Unprocessable(Problem("callback_not_found", message, hint, "/callback"))
    if webhook.disabled_at is not None:
        raise Unprocessable(Problem("webhook_disabled", outbox.DISABLED, _MAKE_ANOTHER, "/callback"))


def _enabled(session: Session, project_id: str, webhook_id: str) -> Webhook:
    webhook = get_webhook(session, project_id, webhook_id)
    if webhook.disabled_at is not None:
        raise Conflict("webhook_disabled", outbox.DISABLED, _MAKE_ANOTHER)
    return webhook


def _not_found(webhook_id: str) -> NotFound:
    return NotFound("webhook_not_found", f"There is no webhook {webhook_id!r}.")
