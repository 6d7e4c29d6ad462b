"""What can be done with jobs over HTTP. A function that takes a session works in the caller's transaction.
`submit`, `clone`, `preview` and `estimate` open their own, because models are looked up in between, with none
open."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic_core import to_json
from sqlalchemy.orm import Session

from api import database as clock
from api.cursors import Position, next_cursor
from api.database import Database
from api.errors import Conflict, NotFound
from api.ids import new_id
from api.jobs import events, idempotency, quotas, repository, scheduling, twins
from api.jobs.attempts import deadline
from api.jobs.estimates import Estimate
from api.jobs.idempotency import Repeatable
from api.jobs.models import ACTIVE, CANCELLABLE, RETRYABLE, TERMINAL, Job, JobStatus
from api.jobs.repository import JobFilter, JobOrder, Version
from api.jobs.schemas import (
    EventPage,
    EventRead,
    JobOutline,
    JobOverrides,
    JobPage,
    JobPlanned,
    JobProgress,
    JobRead,
    JobSubmit,
    Obstacle,
)
from api.jobs.submission import SHORT_FORM, PlannedJob, plan_job
from api.projects.service import s3_access
from api.security import Principal
from api.settings import Settings
from api.tracing import current_traceparent
from api.webhooks.service import check_callback
from api.workers import repository as workers
from compression.recipe import DatasetSpec

SUBMIT_ROUTE = "POST /v1/jobs"


@dataclass(frozen=True)
class Shown:
    """What a job shows. etag: another one after every change. body: the JSON of a JobDetail, None for a
    caller who has it."""

    etag: str
    body: bytes | None


@dataclass(frozen=True)
class Submitted:
    """The job that a submission made. is_new: False where an earlier request with the same key made it."""

    job: JobRead
    is_new: bool


def submit(
    database: Database,
    settings: Settings,
    caller: Principal,
    body: JobSubmit,
    idempotency_key: str | None,
    *,
    clone_of: str | None = None,
) -> Submitted:
    """Plan and store a job, or find the one that an earlier request with the same Idempotency-Key made.

    Raises:
        Unprocessable: it cannot succeed; or `idempotency_key_reused`, for the same key with another body.
        Unavailable: `hub_unreachable`, `s3_unreachable`.
        TooManyRequests: `quota_queued`.
    """
    with database.read() as session:
        earlier = find_repeated(session, caller.project_id, idempotency_key, body)
    if earlier is not None:
        return Submitted(JobRead.of(earlier), is_new=False)
    planned = _plan(database, settings, caller.project_id, body)
    with database.write() as session:
        job = create(
            session,
            caller.project_id,
            planned,
            settings,
            idempotency_key,
            max_queued=caller.limits.max_queued,
            clone_of=clone_of,
        )
        return Submitted(JobRead.of(job), is_new=True)


def clone(
    database: Database,
    settings: Settings,
    caller: Principal,
    job_id: str,
    overrides: JobOverrides,
    idempotency_key: str | None,
) -> Submitted:
    """Submit a job like another of the project, with changes. Raises what `submit` raises, and:

    Raises:
        NotFound: `job_not_found`.
    """
    with database.read() as session:
        body = cloned(session, caller.project_id, job_id, overrides)
    return submit(database, settings, caller, body, idempotency_key, clone_of=job_id)


def preview(database: Database, settings: Settings, caller: Principal, body: JobSubmit) -> JobPlanned:
    """What a submission would become. Raises what `submit` raises of it."""
    planned = _plan(database, settings, caller.project_id, body)
    return JobPlanned(**outline(planned).model_dump(), plan=planned.decided.document)


def estimate(database: Database, settings: Settings, caller: Principal, body: JobSubmit) -> Estimate:
    """What a job would take. Raises what `submit` raises of its plan."""
    with database.read() as session:
        access = s3_access(session, caller.project_id, settings)
    return Estimate.model_validate(plan_job(body, settings, access).decided.document)


def _plan(database: Database, settings: Settings, project_id: str, body: JobSubmit) -> PlannedJob:
    """Plan a submission; no transaction is open while its sources are looked up."""
    with database.read() as session:
        check_callback(session, project_id, body.callback)
        access = s3_access(session, project_id, settings)
    return plan_job(body, settings, access)


def find_repeated(session: Session, project_id: str, key: str | None, body: JobSubmit) -> Job | None:
    """The job that an earlier request with the same Idempotency-Key made, if there was one.

    Raises:
        Unprocessable: `idempotency_key_reused`, for the same key with another body.
    """
    job_id = idempotency.find(session, _repeatable(project_id, key, body))
    return None if job_id is None else get_job(session, project_id, job_id)


def outline(planned: PlannedJob) -> JobOutline:
    """What a planned job would be, in short."""
    plan = planned.decided.plan
    return JobOutline(
        model=planned.body.model,
        scheme=plan.recipe.representation,
        method=plan.recipe.methods,
        layers_total=len(plan.layers),
        device_class=planned.body.resources.device_class,
    )


def create(
    session: Session,
    project_id: str,
    planned: PlannedJob,
    settings: Settings,
    idempotency_key: str | None,
    *,
    max_queued: int | None,
    clone_of: str | None = None,
) -> Job:
    """Store a planned job with its first event, or find the one of a request with the same key.

    Raises:
        TooManyRequests: `quota_queued`.
    """
    now = clock.now(session)
    job = new_job(new_id("job", now), project_id, planned, settings, now)
    request = _repeatable(project_id, idempotency_key, planned.body)
    made = idempotency.keep(session, request, job.id, now)
    if made != job.id:
        return get_job(session, project_id, made)
    quotas.require_room(session, project_id, max_queued)
    add(session, [(job, planned)], {} if clone_of is None else {"clone_of": clone_of})
    return job


def add(session: Session, planned: Sequence[tuple[Job, PlannedJob]], origin: dict[str, str]) -> None:
    """Store new jobs of a project, each with its first events; what was made already is taken from there.

    origin: what the first event says of where a job comes from.
    """
    repository.keep_plans(session, {each.decided.sha256: each.decided.text for _, each in planned})
    twins.identify(session, planned)
    jobs = [job for job, _ in planned]
    reused = twins.attach_new(session, jobs)
    told = []
    for job, each in planned:
        first = ("job_queued", {"device_class": job.device_class, **origin})
        warnings = [
            ("warning", {"code": warning.code, "message": warning.message})
            for warning in each.decided.plan.warnings
        ]
        told += events.numbered(job, [first, *warnings], job.created_at)
    session.add_all(jobs)
    session.flush()  # before the events, which refer to them
    events.store(session, told)
    for job, twin in reused:
        twins.reuse(session, job, twin)


def get_job(session: Session, project_id: str, job_id: str) -> Job:
    """The project's job.

    Raises:
        NotFound: `job_not_found`, also for another project's.
    """
    return _found(repository.get(session, project_id, job_id), job_id)


def show(
    session: Session,
    project_id: str,
    job_id: str,
    *,
    known_etags: Collection[str],
    lease_seconds: float,
    max_running: int | None,
) -> Shown:
    """A job with its plan and attempts. What a caller knows is found out without reading all of it.

    Raises:
        NotFound: `job_not_found`.
    """

    def obstacle(version: Version) -> Obstacle | None:
        return _obstacle(session, project_id, job_id, version, lease_seconds, max_running)

    if known_etags:
        version = repository.version(session, project_id, job_id)
        if version is not None and (etag := _etag(version, obstacle(version))) in known_etags:
            return Shown(etag, None)
    rows = repository.get_whole(session, project_id, job_id)
    if not rows:
        raise _not_found(job_id)
    job = rows[0]
    version = Version(*(getattr(job, name) for name in Version._fields))
    seen = obstacle(version)
    progress = to_json(JobProgress.of_whole(rows, seen)).removesuffix(b"}")
    plan = job.plan_text.encode()  # it may be large: not read to be written again
    return Shown(_etag(version, seen), b'%s,"plan":%s}' % (progress, plan))


def _obstacle(
    session: Session,
    project_id: str,
    job_id: str,
    version: Version,
    lease_seconds: float,
    max_running: int | None,
) -> Obstacle | None:
    """What keeps a job waiting."""
    if version.status != JobStatus.QUEUED:
        return None
    lost = repository.lost_store(session, job_id) if version.attempts_made else None
    if lost is not None:
        return scheduling.store_obstacle(lost)
    alive = [worker for worker, _ in workers.list_alive(session, lease_seconds)]
    found = scheduling.obstacle(version, alive)
    if found is None and max_running is not None:
        running = repository.count(session, project_id, ACTIVE)
        found = scheduling.quota_obstacle(running, max_running)
    return found


def _etag(version: Version, obstacle: Obstacle | None) -> str:
    reason = "" if obstacle is None else f"-{zlib.crc32(obstacle.message.encode()):08x}"
    return f'W/"{version.event_seq}-{version.layers_done}{reason}"'


def list_jobs(
    session: Session,
    project_id: str,
    wanted: JobFilter,
    order: JobOrder,
    cursor: str | None,
    limit: int,
) -> JobPage:
    """A page of jobs.

    Raises:
        Unprocessable: `bad_cursor`.
    """
    after = None if cursor is None else Position.of_cursor(cursor)
    jobs = repository.list_page(session, project_id, wanted, order, after, limit + 1)
    return JobPage(items=[JobRead.of(job) for job in jobs[:limit]], next_cursor=next_cursor(jobs, limit))


def list_events(session: Session, project_id: str, job_id: str, since: int, limit: int) -> EventPage:
    """A page of a job's events."""
    version = repository.version(session, project_id, job_id)
    if version is None:
        raise _not_found(job_id)
    items = [EventRead.model_validate(event) for event in events.page(session, job_id, since, limit)]
    return EventPage(items=items, next_since=items[-1].seq if items else since, status=version.status)


def get_report(session: Session, project_id: str, job_id: str) -> dict[str, Any]:
    """The report of a job that succeeded, or that failed its quality gate.

    Raises:
        NotFound: `report_not_available`.
    """
    job = get_job(session, project_id, job_id)
    if job.report is None:
        message = f"The job is {job.status.value} and has no report."
        raise NotFound("report_not_available", message, "A job has its report when it succeeded.")
    return job.report


def cancel(session: Session, project_id: str, job_id: str) -> Job:
    """End a job: at once if it waits, soon if a worker has it. Finished layers stay for a retry.

    Raises:
        Conflict: `not_cancellable`, for a job that ended otherwise.
    """
    job = _found(repository.get_for_update(session, project_id, job_id), job_id)
    if job.status in (JobStatus.CANCELLING, JobStatus.CANCELLED):
        return job
    if job.status not in CANCELLABLE:
        message = f"The job is {job.status.value} already."
        raise Conflict("not_cancellable", message, "Only queued and running jobs can be cancelled.")
    stop(session, [job])
    return job


def stop(session: Session, jobs: Iterable[Job]) -> None:
    """Cancel jobs that can be cancelled and whose rows the caller holds."""
    now = clock.now(session)
    told = []
    for job in jobs:
        kinds = ["cancel_requested"]
        if job.status == JobStatus.QUEUED:
            job.status = JobStatus.CANCELLED
            job.deduplicated_from = None
            job.finished_at = now
            kinds.append("job_cancelled")
        else:
            job.status = JobStatus.CANCELLING
        told += events.numbered(job, [(kind, {}) for kind in kinds], now)
    events.store(session, told)


def retry(session: Session, project_id: str, job_id: str, *, max_queued: int | None) -> Job:
    """Queue a job again that did not succeed, with all attempts anew; finished layers are kept.

    Raises:
        Conflict: `not_retryable`.
        TooManyRequests: `quota_queued`.
    """
    job = _found(repository.get_for_update(session, project_id, job_id), job_id)
    if job.status not in RETRYABLE:
        message = f"The job is {job.status.value}."
        raise Conflict("not_retryable", message, "Only failed, cancelled and expired jobs can be retried.")
    quotas.require_room(session, project_id, max_queued)
    now = clock.now(session)
    job.status = JobStatus.QUEUED
    job.attempts_counted = 0
    job.available_at = now
    job.queue_deadline = deadline(now, job.max_queue_seconds)
    job.finished_at = None
    job.error_code = job.error_message = None
    job.report = job.deduplicated_from = None
    job.traceparent = current_traceparent()
    session.flush()
    events.append(session, job.id, "job_queued", {"device_class": job.device_class, "retry": True})
    return job


def cloned(session: Session, project_id: str, job_id: str, overrides: JobOverrides) -> JobSubmit:
    """The submission of a job, with changes; a `recipe` or anything of the short form replaces its recipe.

    Raises:
        NotFound: `job_not_found`.
    """
    job = _found(repository.get(session, project_id, job_id, deferred=[Job.dataset]), job_id)
    fields = {name: getattr(job, name) for name in JobSubmit.model_fields if hasattr(job, name)}
    given = overrides.model_dump(mode="json", exclude_unset=True)
    if SHORT_FORM & given.keys():
        del fields["recipe"]
    fields = {name: value for name, value in fields.items() if name not in SHORT_FORM}
    fields["resources"] = {"device_class": job.device_class}
    return JobSubmit.model_validate(fields | given)


def delete(session: Session, project_id: str, job_id: str) -> None:
    """Delete a job that has ended: it is gone for every reader, its files and its row follow.

    Raises:
        Conflict: `not_deletable`.
    """
    job = _found(repository.get_for_update(session, project_id, job_id), job_id)
    if job.status not in TERMINAL:
        message = f"The job is {job.status.value}."
        raise Conflict("not_deletable", message, "Cancel it, and delete it when it has ended.")
    job.deleted_at = clock.now(session)
    repository.forget_idempotency_keys(session, job_id)
    session.flush()


def new_job(job_id: str, project_id: str, planned: PlannedJob, settings: Settings, now: datetime) -> Job:
    """The row of a planned job, which is for the caller to `add`."""
    body, plan = planned.body, planned.decided.plan
    memory = planned.decided.document["memory"]["exact"]
    return Job(
        id=job_id,
        project_id=project_id,
        name=body.name,
        labels=body.labels,
        priority=body.priority,
        model=body.model,
        source=planned.source,
        dataset_label=_dataset_label(body.dataset),
        scheme=plan.recipe.representation,
        method=plan.recipe.methods,
        recipe=plan.recipe.model_dump(mode="json"),
        dataset=planned.dataset and planned.dataset.model_dump(mode="json"),
        calibration=body.calibration.model_dump(mode="json"),
        evaluation=body.evaluation.model_dump(mode="json"),
        quality_gate=body.quality_gate and body.quality_gate.model_dump(mode="json"),
        require=body.require,
        max_runtime_seconds=body.max_runtime_seconds,
        max_queue_seconds=body.max_queue_seconds,
        cache=body.cache,
        callback=body.callback,
        output=body.output,
        max_attempts=settings.max_attempts,
        plan_id=planned.decided.sha256,
        device_class=body.resources.device_class,
        required_host_bytes=memory["host_bytes"],
        required_gpu_bytes=memory["gpu_bytes"],
        status=JobStatus.QUEUED,
        layers_done=0,
        layers_total=len(plan.layers),
        event_seq=0,
        attempts_made=0,
        attempts_counted=0,
        lease_token=0,
        created_at=now,
        available_at=now,
        queue_deadline=deadline(now, body.max_queue_seconds),
        traceparent=current_traceparent(),
    )


def _found(job: Job | None, job_id: str) -> Job:
    if job is None:
        raise _not_found(job_id)
    return job


def _not_found(job_id: str) -> NotFound:
    return NotFound("job_not_found", f"There is no job {job_id!r}.")


def _dataset_label(dataset: DatasetSpec | None) -> str | None:
    if dataset is None:
        return None
    if dataset.generated:
        return "self"
    return dataset.path or dataset.hub or dataset.s3 or f"{len(dataset.texts or ())} inline texts"


def _repeatable(project_id: str, key: str | None, body: JobSubmit) -> Repeatable:
    return Repeatable(project_id, SUBMIT_ROUTE, key, body)
