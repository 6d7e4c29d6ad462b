"""/v1/webhooks"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response

from api.http.codes import EVERYWHERE, WITH_BODY, documented
from api.http.dependencies import Admin, AppContext, Context, Reader, Submitter
from api.projects.principal import Principal
from api.webhooks import service
from api.webhooks.models import DeliveryStatus
from api.webhooks.repository import DeliveryFilter
from api.webhooks.schemas import (
    DeliveryPage,
    DeliveryRead,
    WebhookCreate,
    WebhookCreated,
    WebhookPage,
    WebhookRead,
)

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"], responses=documented(EVERYWHERE))

_WEBHOOK = {404: ["webhook_not_found"]}

Cursor = Annotated[str | None, Query(max_length=200)]
Limit = Annotated[int, Query(ge=1, le=100)]


@router.post(
    "",
    status_code=201,
    response_model=WebhookCreated,
    responses=documented(WITH_BODY, {422: ["webhook_url_not_allowed", "webhook_host_not_found"]}),
)
async def create_webhook(
    body: WebhookCreate, caller: Admin, context: Context, response: Response
) -> WebhookCreated:
    """Make a webhook. The secret in the answer is shown this once.

    Needs the scope admin: a webhook tells of all the project's jobs, and outlives the key that made it.
    """
    webhook = await context.resolver_threads.run(_created, context, caller, body)
    response.headers["Location"] = f"/v1/webhooks/{webhook.id}"
    return webhook


def _created(context: AppContext, caller: Principal, body: WebhookCreate) -> WebhookCreated:
    service.check_url(body.url, context.settings.webhook_allowed_hosts)
    with context.database.write() as session:
        return WebhookCreated.model_validate(service.create(session, caller.project_id, body))


@router.get("", response_model=WebhookPage, responses=documented({422: ["bad_cursor"]}))
def list_webhooks(caller: Reader, context: Context, cursor: Cursor = None, limit: Limit = 20) -> WebhookPage:
    """List webhooks a page at a time, the newest first."""
    with context.database.read() as session:
        return service.list_webhooks(session, caller.project_id, cursor, limit)


@router.get("/{webhook_id}", response_model=WebhookRead, responses=documented(_WEBHOOK))
def get_webhook(webhook_id: str, caller: Reader, context: Context) -> WebhookRead:
    """A webhook, without its secret."""
    with context.database.read() as session:
        return WebhookRead.model_validate(service.get_webhook(session, caller.project_id, webhook_id))


@router.delete("/{webhook_id}", status_code=204, responses=documented(_WEBHOOK))
def delete_webhook(webhook_id: str, caller: Admin, context: Context) -> None:
    """Delete a webhook and its log. What was still to be sent there is not sent."""
    with context.database.write() as session:
        service.delete(session, caller.project_id, webhook_id)


@router.post(
    "/{webhook_id}/ping",
    status_code=202,
    response_model=DeliveryRead,
    responses=documented(_WEBHOOK, {409: ["webhook_disabled"]}),
)
def ping_webhook(webhook_id: str, caller: Submitter, context: Context) -> DeliveryRead:
    """Send a message of the type ping, to see whether the receiver gets it."""
    with context.database.write() as session:
        return DeliveryRead.model_validate(service.ping(session, caller.project_id, webhook_id))


@router.get(
    "/{webhook_id}/deliveries",
    response_model=DeliveryPage,
    responses=documented(_WEBHOOK, {422: ["bad_cursor"]}),
)
def list_deliveries(
    webhook_id: str,
    caller: Reader,
    context: Context,
    status: DeliveryStatus | None = None,
    job_id: Annotated[str | None, Query(max_length=40)] = None,
    cursor: Cursor = None,
    limit: Limit = 20,
) -> DeliveryPage:
    """What was sent to a webhook, and what is still to be sent, the newest first."""
    filters = DeliveryFilter(status, job_id)
    with context.database.read() as session:
        return service.list_deliveries(session, caller.project_id, webhook_id, filters, cursor, limit)


@router.post(
    "/{webhook_id}/deliveries/{delivery_id}/redeliver",
    status_code=202,
    response_model=DeliveryRead,
    responses=documented(_WEBHOOK, {404: ["delivery_not_found"], 409: ["webhook_disabled"]}),
)
def redeliver(webhook_id: str, delivery_id: str, caller: Submitter, context: Context) -> DeliveryRead:
    """Send a message again, the same under the same id, and retry it as if it were new."""
    with context.database.write() as session:
        delivery = service.redeliver(session, caller.project_id, webhook_id, delivery_id)
        return DeliveryRead.model_validate(delivery)
