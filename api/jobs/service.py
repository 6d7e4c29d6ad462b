"""What can be done with jobs that exist, in the caller's transaction."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json
from sqlalchemy.orm import InstrumentedAttribute, Session

from api import database as clock
from api.cursors import Position, next_cursor
from api.errors import Conflict, NotFound
from api.jobs.ledger import events, repository
from api.jobs.ledger.models import ACTIVE, CANCELLABLE, RETRYABLE, TERMINAL, Job, JobStatus
from api.jobs.ledger.repository import JobFilter, JobOrder, Version
from api.jobs.ledger.views import JobRead
from api.jobs.queue import quotas, scheduling, workers
from api.jobs.queue.attempts import deadline
from api.jobs.queue.scheduling import Obstacle
from api.jobs.schemas import EventPage, EventRead, JobPage, JobProgress
from api.tracing import current_traceparent


@dataclass(frozen=True)
class JobAnswer:
    """The answer to GET of a job. etag: changes with every change of the job. body: the JSON of a JobDetail;
    None where the caller has it already."""

    etag: str
    body: bytes | None


def get_job(
    session: Session, project_id: str, job_id: str, *, deferred: Sequence[InstrumentedAttribute[Any]] = ()
) -> Job:
    """The project's job, with these of the columns that are left out otherwise.

    Raises:
        NotFound: `job_not_found`, also for another project's.
    """
    return _found(repository.get(session, project_id, job_id, deferred=deferred), job_id)


def show(
    session: Session,
    project_id: str,
    job_id: str,
    *,
    known_etags: Collection[str],
    lease_seconds: float,
    max_running: int | None,
) -> JobAnswer:
    """A job with its plan and attempts. Whether the caller has it already is found out without reading the
    plan.

    Raises:
        NotFound: `job_not_found`.
    """

    def obstacle(version: Version) -> Obstacle | None:
        return _obstacle(session, project_id, job_id, version, lease_seconds, max_running)

    if known_etags:
        version = repository.version(session, project_id, job_id)
        if version is not None and (etag := _etag(version, obstacle(version))) in known_etags:
            return JobAnswer(etag, None)
    rows = repository.get_with_attempts(session, project_id, job_id)
    if not rows:
        raise _not_found(job_id)
    job = rows[0]
    version = Version(*(getattr(job, name) for name in Version._fields))
    seen = obstacle(version)
    progress = to_json(JobProgress.of_rows(rows, seen)).removesuffix(b"}")
    plan = job.plan_text.encode()  # it may be large: not read to be written again
    return JobAnswer(_etag(version, seen), b'%s,"plan":%s}' % (progress, plan))


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
    postponed = repository.postponed(session, job_id) if version.attempts_made else None
    if postponed is not None:
        return scheduling.postponed_obstacle(postponed)
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
    filters: JobFilter,
    order: JobOrder,
    cursor: str | None,
    limit: int,
) -> JobPage:
    """A page of jobs.

    Raises:
        Unprocessable: `bad_cursor`.
    """
    after = None if cursor is None else Position.of_cursor(cursor)
    jobs = repository.list_page(session, project_id, filters, order, after, limit + 1)
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
    stored = []
    for job in jobs:
        kinds = ["cancel_requested"]
        if job.status == JobStatus.QUEUED:
            job.status = JobStatus.CANCELLED
            job.deduplicated_from = None
            job.finished_at = now
            kinds.append("job_cancelled")
        else:
            job.status = JobStatus.CANCELLING
        stored += events.numbered(job, [(kind, {}) for kind in kinds], now)
    events.store(session, stored)


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


def _found(job: Job | None, job_id: str) -> Job:
    if job is None:
        raise _not_found(job_id)
    return job


def _not_found(job_id: str) -> NotFound:
    return NotFound("job_not_found", f"There is no job {job_id!r}.")
