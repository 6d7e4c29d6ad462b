"""/v1/jobs"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import structlog
from fastapi import APIRouter, BackgroundTasks, Body, Header, Query, Response
from fastapi.sse import EventSourceResponse
from pydantic import AwareDatetime, Field

from api.http.codes import EVERYWHERE, SUBMISSION, documented
from api.http.dependencies import AppContext, Context, Reader, Submitter
from api.http.following import Waiting, event_stream
from api.jobs import service, submitting
from api.jobs.estimates import Estimate
from api.jobs.ledger.models import TERMINAL, JobStatus
from api.jobs.ledger.repository import JobFilter, JobOrder
from api.jobs.ledger.views import JobRead
from api.jobs.reports import as_csv
from api.jobs.schemas import EventPage, JobDetail, JobPage, JobPlanned
from api.jobs.submission.request import SUBMIT_EXAMPLES, JobOverrides, JobSubmit
from api.jobs.submitting import Submitted
from api.projects.principal import Principal
from api.security import Scope
from api.wake import wake

log = structlog.get_logger(__name__)

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses=documented(EVERYWHERE))

IdempotencyKeyHeader = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        description="The same key with the same body gives the same job or batch, for 24 hours.",
    ),
]

LabelFilter = Annotated[
    Sequence[Annotated[str, Field(max_length=320, pattern=r"^[^:\x00-\x1f\x7f]+:[^\x00-\x1f\x7f]*$")]],
    Query(max_length=32, description="key:value; given more than once, jobs have all of them."),
]

Moment = Annotated[
    AwareDatetime, Field(ge=datetime(1970, 1, 1, tzinfo=UTC), lt=datetime(3000, 1, 1, tzinfo=UTC))
]
DryRun = Annotated[bool, Query(description="Answer with the plan, 200, and store nothing.")]
_JOB = {404: ["job_not_found"]}
_MADE = {422: ["idempotency_key_reused"], 429: ["quota_queued"]}
_CSV: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            "text/csv": {
                "schema": {"type": "string"},
                "example": "name,scheme,relative_error\r\nmodel.layers.0.self_attn.q_proj,W4A16,0.004\r\n",
            }
        }
    }
}
_STREAM = {
    "schema": {"type": "string", "description": "A message an event: its seq, its type, and it as JSON."},
    "example": 'event: job_queued\ndata: {"seq": 1, "at": "2026-11-26T15:00:00.123000Z", "attempt": null, '
    '"type": "job_queued", "data": {}}\nid: 1\n\n',
}
_PLANNED: dict[int | str, dict[str, Any]] = {200: {"model": JobPlanned, "description": "With `dry_run`"}}


@router.post("", status_code=202, response_model=JobRead, responses=documented(SUBMISSION, _MADE) | _PLANNED)
async def submit_job(
    body: Annotated[JobSubmit, Body(openapi_examples=SUBMIT_EXAMPLES)],
    caller: Submitter,
    context: Context,
    background: BackgroundTasks,
    response: Response,
    idempotency_key: IdempotencyKeyHeader = None,
    dry_run: DryRun = False,
) -> JobRead | Response:
    """Submit a job. It is planned at once from the model's headers: what cannot succeed is refused here."""
    if dry_run:
        return await context.planning_threads.run(_previewed, context, caller, body)
    made = await context.planning_threads.run(
        submitting.submit, context.database, context.settings, caller, body, idempotency_key
    )
    return _accepted(made, context, background, response)


def _previewed(context: AppContext, caller: Principal, body: JobSubmit) -> Response:
    planned = submitting.preview(context.database, context.settings, caller, body)
    return Response(planned.model_dump_json(), media_type="application/json")


def _accepted(
    made: Submitted, context: AppContext, background: BackgroundTasks, response: Response
) -> JobRead:
    """Say where the job is, and let a worker look for it after the answer."""
    if made.is_new:
        background.add_task(log.info, "job_accepted", job_id=made.job.id)
        background.add_task(
            context.wake_threads.run, wake, made.job.device_class, broker_url=context.settings.broker_url
        )
    response.headers["Location"] = f"/v1/jobs/{made.job.id}"
    return made.job


@router.post("/estimate", response_model=Estimate, responses=documented(SUBMISSION))
async def estimate_job(
    body: Annotated[JobSubmit, Body(openapi_examples=SUBMIT_EXAMPLES)],
    caller: Submitter,
    context: Context,
) -> Estimate:
    """What a job would take, before it is submitted: memory, disk, output and time, itemized."""
    return await context.planning_threads.run(
        submitting.estimate, context.database, context.settings, caller, body
    )


@router.get("", response_model=JobPage, responses=documented({422: ["bad_cursor"]}))
def list_jobs(
    caller: Reader,
    context: Context,
    status: JobStatus | None = None,
    model: Annotated[str | None, Query(max_length=4096)] = None,
    scheme: Annotated[str | None, Query(max_length=120)] = None,
    method: Annotated[str | None, Query(max_length=120, description="As a job says it.")] = None,
    label: LabelFilter = (),
    created_after: Moment | None = None,
    created_before: Moment | None = None,
    batch: Annotated[str | None, Query(max_length=40, description="The batch that a job came in.")] = None,
    sort: JobOrder = JobOrder.NEWEST,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> JobPage:
    """List jobs a page at a time, the newest first unless `sort` says otherwise."""
    labels = [(key, value) for key, _, value in (text.partition(":") for text in label)]
    filters = JobFilter(status, model, scheme, method, labels, created_after, created_before, batch)
    with context.database.read() as session:
        return service.list_jobs(session, caller.project_id, filters, sort, cursor, limit)


@router.get(
    "/{job_id}",
    response_model=JobDetail,
    responses=documented(_JOB) | {304: {"description": "Nothing changed since `If-None-Match`"}},
)
def get_job(
    job_id: str,
    access: Waiting,
    if_none_match: Annotated[str | None, Header(max_length=1000)] = None,
) -> Response:
    """A job as it stands, with its plan and its attempts."""
    context = access.context
    with context.database.look() as session:
        caller = access.caller(session, Scope.READ)
        shown = service.show(
            session,
            caller.project_id,
            job_id,
            known_etags=[each.strip() for each in if_none_match.split(",")] if if_none_match else (),
            lease_seconds=context.settings.lease_seconds,
            max_running=caller.limits.max_running,
        )
    headers = {"ETag": shown.etag}
    if shown.body is None:
        return Response(status_code=304, headers=headers)
    return Response(shown.body, media_type="application/json", headers=headers)


@router.get(
    "/{job_id}/events",
    response_model=EventPage,
    responses=documented(_JOB)
    | {
        200: {"content": {EventSourceResponse.media_type: _STREAM}},
        204: {"description": "A stream was asked to go on, and the job has ended"},
    },
)
def list_job_events(
    job_id: str,
    caller: Reader,
    context: Context,
    since: Annotated[int, Query(ge=0, le=2**31 - 1, description="Only events after this seq.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    accept: Annotated[str, Header(max_length=1000)] = "*/*",
    last_event_id: Annotated[int | None, Header(ge=0, le=2**31 - 1)] = None,
) -> EventPage | Response:
    """What happened to a job, in order: a page, or with `Accept: text/event-stream` all, as it happens."""
    is_stream = EventSourceResponse.media_type in accept
    if is_stream and last_event_id is not None:
        since = last_event_id
    with context.database.read() as session:
        page = service.list_events(session, caller.project_id, job_id, since, 1 if is_stream else limit)
    if not is_stream:
        return page
    if last_event_id is not None and page.status in TERMINAL and not page.items:
        return Response(status_code=204)  # which tells a browser not to connect again
    return EventSourceResponse(
        event_stream(context, caller.project_id, job_id, since), headers={"Cache-Control": "no-store"}
    )


@router.get(
    "/{job_id}/report",
    response_model=dict[str, Any],
    responses=documented({404: ["job_not_found", "report_not_available"]}) | _CSV,
)
def get_job_report(
    job_id: str,
    caller: Reader,
    context: Context,
    format: Annotated[
        Literal["json", "csv"], Query(description="csv: the modules alone, a line each.")
    ] = "json",
) -> Any:
    """The results: totals, evaluation, and a row for each module."""
    with context.database.read() as session:
        report = service.get_report(session, caller.project_id, job_id)
    if format == "json":
        return report
    headers = {"Content-Disposition": f'attachment; filename="{job_id}.csv"'}
    return Response(as_csv(report), media_type="text/csv", headers=headers)


@router.post(
    "/{job_id}/cancel",
    status_code=202,
    response_model=JobRead,
    responses=documented(_JOB, {409: ["not_cancellable"]}),
)
def cancel_job(job_id: str, caller: Submitter, context: Context) -> JobRead:
    """Cancel a job: at once if it waits, else as soon as its worker sees it. Cancelling twice is no error."""
    with context.database.write() as session:
        return JobRead.of(service.cancel(session, caller.project_id, job_id))


@router.post(
    "/{job_id}/retry",
    status_code=202,
    response_model=JobRead,
    responses=documented(_JOB, {409: ["not_retryable"], 429: ["quota_queued"]}),
)
def retry_job(
    job_id: str,
    caller: Submitter,
    context: Context,
    background: BackgroundTasks,
) -> JobRead:
    """Queue a failed, cancelled or expired job again; it goes on after the last finished layer."""
    with context.database.write() as session:
        job = JobRead.of(
            service.retry(session, caller.project_id, job_id, max_queued=caller.limits.max_queued)
        )
    background.add_task(
        context.wake_threads.run, wake, job.device_class, broker_url=context.settings.broker_url
    )
    return job


@router.post(
    "/{job_id}/clone", status_code=202, response_model=JobRead, responses=documented(_JOB, SUBMISSION, _MADE)
)
async def clone_job(
    job_id: str,
    overrides: JobOverrides,
    caller: Submitter,
    context: Context,
    background: BackgroundTasks,
    response: Response,
    idempotency_key: IdempotencyKeyHeader = None,
) -> JobRead:
    """Submit a job like another, with changes. It reads the same revision of a dataset from the Hub."""
    made = await context.planning_threads.run(
        submitting.clone, context.database, context.settings, caller, job_id, overrides, idempotency_key
    )
    return _accepted(made, context, background, response)


@router.delete("/{job_id}", status_code=204, responses=documented(_JOB, {409: ["not_deletable"]}))
def delete_job(job_id: str, caller: Submitter, context: Context) -> None:
    """Delete a job that has ended, and its files. Cancel one that has not."""
    with context.database.write() as session:
        service.delete(session, caller.project_id, job_id)
