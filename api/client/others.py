"""Everything beside jobs: batches, webhooks, the project and its keys, workers, and what the server takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from api.client.base import PAGE, Base, idempotent, in_path
from api.client.drivers import call, listing
from api.client.flows import Flow, Listing, Request
from api.client.types import (
    AcceptedItem,
    Alive,
    BatchDetail,
    BatchPlanned,
    BatchRead,
    BatchSubmit,
    DatasetList,
    DeliveryRead,
    DeliveryStatus,
    KeyCreated,
    KeyRead,
    MethodList,
    ProjectRead,
    QueueList,
    Ready,
    RefusedItem,
    SchemeList,
    Scope,
    WebhookCreate,
    WebhookCreated,
    WebhookRead,
    WorkerList,
)


class BatchCalls(Base):
    """Calls below /v1/batches."""

    @call
    def submit_batch(
        self, body: BatchSubmit | bytes, *, name: str | None = None, idempotency_key: str | None = None
    ) -> Flow[BatchDetail]:
        """Submit up to 1,000 jobs and return the batch, with every item: a job's id or why it was refused.

        body: jobs or a sweep, or bytes: JSON Lines, the body of a job on each. idempotency_key: as in
        `submit`.
        """
        return self._json(_batch_request(body, idempotent(idempotency_key), {"name": name}))

    @call
    def plan_batch(self, body: BatchSubmit | bytes) -> Flow[BatchPlanned]:
        """What would become of a batch; nothing is stored."""
        return self._json(_batch_request(body, {}, {"dry_run": True}))

    @call
    def batch(self, batch_id: str) -> Flow[BatchRead]:
        """A batch with its counts."""
        return self._get(in_path("batches", batch_id), limit=1)

    @listing
    def batch_items(self, batch_id: str, *, page_size: int = PAGE) -> Listing[AcceptedItem | RefusedItem]:
        """The items of a batch by their index: a job's id, or why it was refused."""
        return self._pages(in_path("batches", batch_id), page_size)

    @listing
    def batches(self, *, page_size: int = PAGE) -> Listing[BatchRead]:
        """All batches, the newest first."""
        return self._pages("/v1/batches", page_size)

    @call
    def cancel_batch(self, batch_id: str) -> Flow[BatchRead]:
        """Cancel all jobs of a batch that wait or run, and return it."""
        return self._post(in_path("batches", batch_id, "cancel"), repeatable=True)


class WebhookCalls(Base):
    """Calls below /v1/webhooks."""

    @call
    def create_webhook(self, body: WebhookCreate) -> Flow[WebhookCreated]:
        """Make a webhook and return it with its secret, which is shown this once."""
        return self._post("/v1/webhooks", body)

    @call
    def webhook(self, webhook_id: str) -> Flow[WebhookRead]:
        """A webhook, without its secret."""
        return self._get(in_path("webhooks", webhook_id))

    @listing
    def webhooks(self, *, page_size: int = PAGE) -> Listing[WebhookRead]:
        """All webhooks, the newest first."""
        return self._pages("/v1/webhooks", page_size)

    @call
    def delete_webhook(self, webhook_id: str) -> Flow[None]:
        """Delete a webhook and its log."""
        return self._delete(in_path("webhooks", webhook_id))

    @call
    def ping_webhook(self, webhook_id: str) -> Flow[DeliveryRead]:
        """Send a webhook a message of the type ping, and return the delivery."""
        return self._post(in_path("webhooks", webhook_id, "ping"))

    @listing
    def deliveries(
        self,
        webhook_id: str,
        *,
        status: DeliveryStatus | None = None,
        job_id: str | None = None,
        page_size: int = PAGE,
    ) -> Listing[DeliveryRead]:
        """What was sent to a webhook and what is still to be sent, the newest first."""
        return self._pages(
            in_path("webhooks", webhook_id, "deliveries"), page_size, status=status, job_id=job_id
        )

    @call
    def redeliver(self, webhook_id: str, delivery_id: str) -> Flow[DeliveryRead]:
        """Send a message again, and return its delivery."""
        return self._post(in_path("webhooks", webhook_id, "deliveries", delivery_id, "redeliver"))


class ProjectCalls(Base):
    """Calls of /v1/project and below /v1/keys."""

    @call
    def project(self) -> Flow[ProjectRead]:
        """The key's project: its limits, and what of them is used."""
        return self._get("/v1/project")

    @call
    def create_key(
        self, name: str, scopes: Iterable[Scope], *, expires_at: datetime | None = None
    ) -> Flow[KeyCreated]:
        """Make a key for the project and return it; `key` is shown this once."""
        body = {"name": name, "scopes": list(scopes), "expires_at": expires_at and expires_at.isoformat()}
        return self._post("/v1/keys", body)

    @listing
    def api_keys(self, *, page_size: int = PAGE) -> Listing[KeyRead]:
        """The project's keys, the newest first, those that are revoked among them."""
        return self._pages("/v1/keys", page_size)

    @call
    def revoke_key(self, key_id: str) -> Flow[None]:
        """Revoke a key; from then on it is refused."""
        return self._delete(in_path("keys", key_id))


class ServerCalls(Base):
    """What the server takes, and how it is."""

    @call
    def methods(self) -> Flow[MethodList]:
        """The methods that a recipe's steps may name."""
        return self._get("/v1/methods")

    @call
    def schemes(self) -> Flow[SchemeList]:
        """The schemes that weights may get."""
        return self._get("/v1/schemes")

    @call
    def datasets(self) -> Flow[DatasetList]:
        """The kinds of datasets and those that have a short name, with defaults and limits."""
        return self._get("/v1/datasets")

    @call
    def workers(self) -> Flow[WorkerList]:
        """The workers that are alive."""
        return self._get("/v1/workers")

    @call
    def queues(self) -> Flow[QueueList]:
        """How many jobs wait and run, by device class."""
        return self._get("/v1/queues")

    @call
    def alive(self) -> Flow[Alive]:
        """The process answers. Needs no key."""
        return self._get("/livez")

    @call
    def ready(self) -> Flow[Ready]:
        """The server's schema and store are as they should be, or ApiError says what is not. Needs no key."""
        return self._get("/readyz")


def _batch_request(
    body: BatchSubmit | bytes, headers: Mapping[str, str], params: Mapping[str, Any]
) -> Request:
    kind = {"Content-Type": "application/jsonl"} if isinstance(body, bytes) else {}
    json, content = (None, body) if isinstance(body, bytes) else (body, None)
    return Request(
        "POST", "/v1/batches", params, {**headers, **kind}, json=json, content=content, repeatable=True
    )
