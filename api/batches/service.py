"""What can be done with batches. A function that takes a session works in the caller's transaction. `submit`
and `preview` open their own, because models are looked up in between, with none open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from sqlalchemy.orm import Session

from api import database as clock
from api.batches import repository
from api.batches.schemas import (
    MAX_ITEMS,
    AcceptedItem,
    BatchCounts,
    BatchDetail,
    BatchPage,
    BatchPlanned,
    BatchRead,
    BatchSubmit,
    Item,
    PlannedItem,
    RefusedItem,
)
from api.cursors import Position, next_cursor
from api.database import Database
from api.errors import NotFound, Refusal, Unprocessable
from api.ids import new_id, new_ids
from api.jobs import service as jobs
from api.jobs import submitting
from api.jobs.ledger.models import Batch, JobStatus
from api.jobs.queue import quotas, workers
from api.jobs.submission import idempotency
from api.jobs.submission.idempotency import IdempotentRequest
from api.jobs.submission.planning import PlannedJob, Planner
from api.projects.principal import Principal
from api.projects.service import s3_access
from api.settings import Settings
from api.webhooks.service import check_callback

SUBMIT_ROUTE = "POST /v1/batches"

Outcome = PlannedJob | Refusal
"""What becomes of an item."""


@dataclass(frozen=True)
class SubmittedBatch:
    """The batch that a submission made. wake_ups: how many workers of each device class are to look for its
    jobs; None where an earlier request with the same key made it."""

    batch: BatchDetail
    wake_ups: Mapping[str, int] | None


def submit(
    database: Database, settings: Settings, caller: Principal, body: BatchSubmit, idempotency_key: str | None
) -> SubmittedBatch:
    """Plan and store a batch, or find the one that an earlier request with the same Idempotency-Key made.

    Raises:
        Unprocessable: `idempotency_key_reused`, for the same key with another body.
        Unavailable: `hub_unreachable`, `s3_unreachable`.
    """
    items = body.items()
    request = _idempotent_request(caller.project_id, idempotency_key, body, items)
    with database.read() as session:
        earlier = _find_earlier(session, request)
    if earlier is not None:
        return SubmittedBatch(earlier, None)
    outcomes = _plan_items(database, settings, caller.project_id, items)
    with database.write() as session:
        return _create(session, request, body, outcomes, settings, max_queued=caller.limits.max_queued)


def preview(database: Database, settings: Settings, caller: Principal, body: BatchSubmit) -> BatchPlanned:
    """What a batch would be. Raises what `submit` raises of its plans."""
    outcomes = _plan_items(database, settings, caller.project_id, body.items())
    items = [
        RefusedItem(index=index, error=outcome)
        if isinstance(outcome, Refusal)
        else PlannedItem(index=index, **submitting.outline(outcome).model_dump())
        for index, outcome in enumerate(outcomes)
    ]
    refused = sum(isinstance(item, RefusedItem) for item in items)
    return BatchPlanned(total=len(items), accepted=len(items) - refused, refused=refused, items=items)


def _plan_items(
    database: Database, settings: Settings, project_id: str, items: Sequence[Item]
) -> list[Outcome]:
    """Plan every item on its own.

    Raises:
        Unavailable: `hub_unreachable`, `s3_unreachable`; whether the item that names what
            is there can succeed is then not known.
    """
    with database.read() as session:
        access = s3_access(session, project_id, settings)
        callbacks = {item.callback for item in items if not isinstance(item, Refusal)}
        refused = {callback: _callback_refusal(session, project_id, callback) for callback in callbacks}
    planner = Planner(settings, access)

    def outcome(item: Item) -> Outcome:
        if isinstance(item, Refusal):
            return item
        refusal = refused[item.callback]
        if refusal is not None:
            return refusal
        try:
            return planner.plan(item)
        except Unprocessable as error:
            return Refusal.of(error)

    return [outcome(item) for item in items]


def _callback_refusal(session: Session, project_id: str, callback: str | None) -> Refusal | None:
    """Why a job with this callback is refused; None where it is not."""
    try:
        check_callback(session, project_id, callback)
    except Unprocessable as error:
        return Refusal.of(error)
    return None


def _idempotent_request(
    project_id: str, key: str | None, body: BatchSubmit, items: Sequence[Item]
) -> IdempotentRequest:
    """The request; a sweep asks for the same as the jobs that it stands for."""
    return IdempotentRequest(
        project_id, SUBMIT_ROUTE, key, {"name": body.name, "labels": body.labels, "items": items}
    )


def _find_earlier(session: Session, request: IdempotentRequest) -> BatchDetail | None:
    """The batch that an earlier request with the same Idempotency-Key made, if there was one.

    Raises:
        Unprocessable: `idempotency_key_reused`, for the same key with another body.
    """
    batch_id = idempotency.find(session, request)
    return None if batch_id is None else describe(session, request.project_id, batch_id, -1, MAX_ITEMS)


def _create(
    session: Session,
    request: IdempotentRequest,
    body: BatchSubmit,
    outcomes: Sequence[Outcome],
    settings: Settings,
    *,
    max_queued: int | None,
) -> SubmittedBatch:
    """Store a batch with its jobs, or find the one of a request with the same key, which came in while this
    one was planned. Jobs that the project's queue has no room for are refused."""
    now = clock.now(session)
    batch_id = new_id("batch", now)
    made = idempotency.keep(session, request, batch_id, now)
    if made != batch_id:
        return SubmittedBatch(describe(session, request.project_id, made, -1, MAX_ITEMS), None)
    outcomes = _with_room(outcomes, quotas.room_in_queue(session, request.project_id, max_queued), max_queued)
    planned = [(index, each) for index, each in enumerate(outcomes) if not isinstance(each, Refusal)]
    refused = [
        RefusedItem(index=index, error=each)
        for index, each in enumerate(outcomes)
        if isinstance(each, Refusal)
    ]
    batch = Batch(
        id=batch_id,
        project_id=request.project_id,
        name=body.name,
        labels=body.labels,
        accepted=len(planned),
        refused=len(refused),
        refusals=[item.model_dump() for item in refused],
        created_at=now,
    )
    session.add(batch)
    session.flush()  # before the jobs, which refer to it
    rows = []
    for job_id, (index, each) in zip(new_ids("job", now, len(planned)), planned, strict=True):
        job = submitting.new_job(job_id, request.project_id, each, settings, now)
        job.batch_id, job.batch_index = batch_id, index
        rows.append((job, each))
    submitting.add(session, rows, {"batch": batch_id})
    made_batch = describe(session, request.project_id, batch_id, -1, MAX_ITEMS)
    queued = [
        job.device_class
        for job, _ in rows
        if job.status == JobStatus.QUEUED and job.deduplicated_from is None
    ]
    return SubmittedBatch(made_batch, _wake_ups(session, queued, lease_seconds=settings.lease_seconds))


def _with_room(outcomes: Sequence[Outcome], room: int | None, max_queued: int | None) -> Sequence[Outcome]:
    """The same outcomes, where all but the first `room` jobs are refused. room: None is no limit."""
    if room is None:
        return outcomes
    full = Refusal.of(quotas.queue_is_full(max_queued))
    jobs_before = accumulate(isinstance(each, PlannedJob) for each in outcomes)
    return [
        full if isinstance(each, PlannedJob) and number > room else each
        for each, number in zip(outcomes, jobs_before, strict=True)
    ]


def _wake_ups(session: Session, queued: Sequence[str], *, lease_seconds: float) -> Mapping[str, int]:
    """How many wake-ups each device class gets: one a job, as far as there are workers. A worker that is
    awake goes on until no job is left.

    queued: the device class of each new job that waits for a worker.
    """
    alive = len(workers.list_alive(session, lease_seconds))
    return {device_class: min(count, alive) for device_class, count in Counter(queued).items()}


def describe(session: Session, project_id: str, batch_id: str, after: int, limit: int) -> BatchDetail:
    """A batch with at most `limit` of its items behind an index.

    Raises:
        NotFound: `batch_not_found`, also for another project's.
    """
    batch = _found(repository.get(session, project_id, batch_id, deferred=[Batch.refusals]), batch_id)
    items: list[AcceptedItem | RefusedItem] = [
        AcceptedItem(index=index, job_id=job_id)
        for index, job_id in repository.job_ids(session, batch_id, after, limit + 1)
    ]
    items += [RefusedItem.model_validate(item) for item in batch.refusals if item["index"] > after]
    items.sort(key=lambda item: item.index)
    return BatchDetail(
        **_read(session, [batch])[0].model_dump(),
        items=items[:limit],
        next_cursor=items[limit - 1].index if len(items) > limit else None,
    )


def list_batches(session: Session, project_id: str, cursor: str | None, limit: int) -> BatchPage:
    """A page of batches.

    Raises:
        Unprocessable: `bad_cursor`.
    """
    after = None if cursor is None else Position.of_cursor(cursor)
    found = repository.list_page(session, project_id, after, limit + 1)
    return BatchPage(items=_read(session, found[:limit]), next_cursor=next_cursor(found, limit))


def cancel(session: Session, project_id: str, batch_id: str) -> BatchRead:
    """Cancel all jobs of a batch that wait or run; the others stay as they are.

    Raises:
        NotFound: `batch_not_found`.
    """
    batch = _found(repository.get(session, project_id, batch_id), batch_id)
    jobs.stop(session, repository.cancellable_for_update(session, batch_id))
    return _read(session, [batch])[0]


def _read(session: Session, batches: Sequence[Batch]) -> list[BatchRead]:
    by_status = repository.count_jobs(session, [batch.id for batch in batches])
    return [
        BatchRead(
            id=batch.id,
            name=batch.name,
            labels=batch.labels,
            created_at=batch.created_at,
            counts=BatchCounts.of(batch, by_status[batch.id]),
        )
        for batch in batches
    ]


def _found(batch: Batch | None, batch_id: str) -> Batch:
    if batch is None:
        raise NotFound("batch_not_found", f"There is no batch {batch_id!r}.")
    return batch
