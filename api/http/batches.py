"""/v1/batches"""

from __future__ import annotations

from email.message import Message
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, BackgroundTasks, Body, Depends, Query, Request, Response

from api.batches import service
from api.batches.schemas import (
    BATCH_EXAMPLES,
    MAX_ITEMS,
    BatchDetail,
    BatchPage,
    BatchPlanned,
    BatchRead,
    BatchSubmit,
    check_count,
)
from api.errors import WrongMediaType
from api.http.codes import EVERYWHERE, SUBMISSION, WITH_BODY, documented
from api.http.dependencies import AppContext, Context, Reader, Submitter
from api.http.jobs import IdempotencyKeyHeader
from api.jobs.submission.request import Name
from api.projects.principal import Principal
from api.wake import wake_all

JSON_LINES = ("application/jsonl", "application/x-ndjson")

log = structlog.get_logger(__name__)

router = APIRouter(prefix="/v1/batches", tags=["batches"], responses=documented(EVERYWHERE))

_LINES: dict[str, Any] = {
    "schema": {"type": "string", "description": "The body of a job on each line."},
    "example": '{"model": "/models/llama", "scheme": "W4A16"}\n{"model": "org/model", "scheme": "W8A8"}\n',
}
_LINES_TOO = {"requestBody": {"content": dict.fromkeys(JSON_LINES, _LINES)}}
_REFUSED = (
    *("batch_empty", "batch_too_large", "jobs_or_sweep", "sweep_base_overlaps"),
    *("label_key_invalid", "idempotency_key_reused"),
)
_PLANNED: dict[int | str, dict[str, Any]] = {200: {"model": BatchPlanned, "description": "With `dry_run`"}}


async def _check_body(request: Request) -> None:
    """What is neither JSON nor JSON Lines would otherwise be read as the latter."""
    header = Message()
    header["Content-Type"] = request.headers.get("Content-Type", "")
    kind = header.get_content_type()
    if kind not in JSON_LINES and not (kind.startswith("application/") and kind.endswith(("/json", "+json"))):
        hint = f"Send `Content-Type: application/json`, or `{JSON_LINES[0]}` for a job on each line."
        raise WrongMediaType("unsupported_media_type", f"The body is {kind}.", hint)
    if not await request.body():
        check_count(0)


@router.post(
    "",
    status_code=202,
    response_model=BatchDetail,
    responses=documented(WITH_BODY, {422: _REFUSED, 415: ["unsupported_media_type"], 503: SUBMISSION[503]})
    | _PLANNED,
    openapi_extra=_LINES_TOO,
)
async def submit_batch(
    body: Annotated[BatchSubmit, Body(openapi_examples=BATCH_EXAMPLES)],
    caller: Submitter,
    _: Annotated[None, Depends(_check_body)],
    context: Context,
    background: BackgroundTasks,
    name: Annotated[Name | None, Query(description="Of the batch, instead of the body's.")] = None,
    dry_run: Annotated[bool, Query(description="Answer what would become of it, 200.")] = False,
    idempotency_key: IdempotencyKeyHeader = None,
) -> Response:
    """Submit up to 1,000 jobs together, as `jobs`, as a `sweep` or as JSON Lines. Each is accepted or refused
    on its own; if all are refused, that is a batch too, which says why."""
    if name is not None:
        body.name = name
    if dry_run:
        return await context.planning_threads.run(_previewed, context, caller, body)
    return await context.planning_threads.run(_submitted, context, caller, body, idempotency_key, background)


def _previewed(context: AppContext, caller: Principal, body: BatchSubmit) -> Response:
    planned = service.preview(context.database, context.settings, caller, body)
    return Response(planned.model_dump_json(), media_type="application/json")


def _submitted(
    context: AppContext,
    caller: Principal,
    body: BatchSubmit,
    idempotency_key: str | None,
    background: BackgroundTasks,
) -> Response:
    """The answer, made here: it may be long, and the event loop is for all requests."""
    made = service.submit(context.database, context.settings, caller, body, idempotency_key)
    batch = made.batch
    if made.wake_ups is not None:
        counts = batch.counts
        background.add_task(
            log.info, "batch_accepted", batch_id=batch.id, accepted=counts.accepted, refused=counts.refused
        )
        background.add_task(
            context.wake_threads.run, wake_all, made.wake_ups, broker_url=context.settings.broker_url
        )
    headers = {"Location": f"/v1/batches/{batch.id}"}
    return Response(batch.model_dump_json(), 202, headers, "application/json")


@router.get("", response_model=BatchPage, responses=documented({422: ["bad_cursor"]}))
def list_batches(
    caller: Reader,
    context: Context,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> BatchPage:
    """List batches a page at a time, the newest first."""
    with context.database.read() as session:
        return service.list_batches(session, caller.project_id, cursor, limit)


@router.get("/{batch_id}", response_model=BatchDetail, responses=documented({404: ["batch_not_found"]}))
def get_batch(
    batch_id: str,
    caller: Reader,
    context: Context,
    cursor: Annotated[int, Query(ge=-1, le=MAX_ITEMS, description="Only items behind this index.")] = -1,
    limit: Annotated[int, Query(ge=1, le=MAX_ITEMS, description="Of items.")] = 100,
) -> BatchDetail:
    """A batch as it stands, with a page of its items. Its jobs are listed by `GET /v1/jobs?batch=`."""
    with context.database.read() as session:
        return service.describe(session, caller.project_id, batch_id, cursor, limit)


@router.post(
    "/{batch_id}/cancel",
    status_code=202,
    response_model=BatchRead,
    responses=documented({404: ["batch_not_found"]}),
)
def cancel_batch(batch_id: str, caller: Submitter, context: Context) -> BatchRead:
    """Cancel all jobs of a batch that wait or run. Cancelling twice is no error."""
    with context.database.write() as session:
        return service.cancel(session, caller.project_id, batch_id)
