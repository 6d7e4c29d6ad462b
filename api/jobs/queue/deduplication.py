"""Deduplication: of jobs that are the same work (one cache key), one does it and the others take its result.

    a job is queued, or claimed ──▶ another has succeeded ──▶ succeeded at once, with its files and report
                                └─▶ another is in flight ───▶ queued and attached to it: no worker claims it
                                                               │ the other succeeds: this one succeeds too
                                                               └ the other ends otherwise, or turns out to be
                                                                 different work: this one is detached

The job that does the work is called the original, the others are its duplicates. A duplicate names its
original in deduplicated_from; while it is queued, it is attached.

All functions write in the caller's transaction. A transaction that looks for an original calls `lock_project`
first: of two that look at once, the second one sees what the first one stored. Rows that are found are locked
against their end until the transaction is over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from sqlalchemy import ColumnElement, ScalarSelect, func, select
from sqlalchemy.orm import Session, aliased, undefer

from api import database
from api.jobs.ledger import events
from api.jobs.ledger.models import AttemptOutcome, Job, JobStatus
from api.jobs.queue.attempts import deadline, end_attempt, release_lease

_IN_FLIGHT = (JobStatus.QUEUED, JobStatus.RUNNING)


def lock_project(session: Session, project_id: str) -> None:
    """Be the only transaction that looks for originals in this project. Call it before any row is locked."""
    database.lock(session, f"{project_id} deduplication")


def attach_new(session: Session, jobs: Sequence[Job]) -> list[tuple[Job, Job]]:
    """Find the originals of jobs of one project that are about to be stored, also among themselves, and
    attach those whose original is in flight.

    Returns those whose original has succeeded, with it: to be given to `copy_result` once they are stored.
    """
    keyed = [job for job in jobs if job.cache_key is not None]
    if not keyed:
        return []
    project_id = keyed[0].project_id
    lock_project(session, project_id)
    keys = {job.cache_key for job in keyed if may_deduplicate(job)}
    in_flight = defaultdict(list)
    for original in _in_flight(session, project_id, keys):
        in_flight[original.cache_key].append(original)
    succeeded = {original.cache_key: original for original in _succeeded(session, project_id, keys)}
    finished = []
    for job in keyed:
        if may_deduplicate(job):
            if job.cache_key in succeeded:
                job.deduplicated_from = succeeded[job.cache_key].id
                finished.append((job, succeeded[job.cache_key]))
                continue
            sooner = (original for original in in_flight[job.cache_key] if _ends_sooner(original, job))
            job.deduplicated_from = next((original.id for original in sooner), None)
        if job.deduplicated_from is None:
            in_flight[job.cache_key].append(job)
    return finished


def may_deduplicate(job: Job) -> bool:
    """Whether a job may take another one's result. One whose files are copied elsewhere makes them itself."""
    return job.cache == "use" and job.output is None


def end_as_duplicate(session: Session, job_id: str, attempt: int) -> bool:
    """End an attempt at a job whose original has succeeded, or runs. Returns False where there is none.

    The caller has called `lock_project`, and holds the job's row with its cache key.
    """
    job = session.get_one(Job, job_id, populate_existing=True)
    others = (each for each in _in_flight(session, job.project_id, [job.cache_key]) if each.id != job_id)
    running = next((each for each in others if each.status == JobStatus.RUNNING), None)
    succeeded = next(iter(_succeeded(session, job.project_id, [job.cache_key])), None)
    original = succeeded or running
    if original is None:
        return False
    end_attempt(session, job_id, attempt, AttemptOutcome.DEDUPLICATED)
    release_lease(session, job_id)
    job.deduplicated_from = original.id
    if original is succeeded:
        copy_result(session, job, original)
    else:
        job.status = JobStatus.QUEUED
        session.flush()
    return True


def copy_result(session: Session, job: Job, original: Job) -> None:
    """End a job with the result of its original, and the jobs that are attached to it. The caller holds both
    rows."""
    job.status = JobStatus.SUCCEEDED
    job.deduplicated_from = original.id
    job.layers_done = job.layers_total
    job.report, job.manifest_key = original.report, original.manifest_key
    job.error_code = job.error_message = None
    job.finished_at = database.now(session)
    session.flush()
    totals = (original.report or {}).get("totals")
    events.append(session, job.id, "job_succeeded", {"totals": totals, "deduplicated_from": original.id})
    finish_attached(session, job.id)


def finish_attached(session: Session, job_id: str) -> None:
    """Give the result of a job that has succeeded to the jobs that are attached to it. The caller holds its
    row."""
    attached = _lock(session, *_attached_to(job_id))
    if attached:
        original = session.get_one(Job, job_id, options=[undefer(Job.report)], populate_existing=True)
        for job in attached:
            copy_result(session, job, original)


def stranded() -> tuple[ColumnElement[bool], ...]:
    """The conditions of jobs that are attached to one that is no longer in flight."""
    gone = func.coalesce(_status_of_original(), JobStatus.FAILED).not_in(_IN_FLIGHT)
    return Job.status == JobStatus.QUEUED, Job.deduplicated_from.is_not(None), gone


def resolve_stranded(session: Session, limit: int) -> int:
    """End or detach at most `limit` stranded jobs. Returns how many there were."""
    found = _lock(session, *stranded(), limit=limit)
    for job in found:
        query = select(Job).where(Job.id == job.deduplicated_from, *_has_result())
        original = session.scalars(
            query.with_for_update(read=True).options(undefer(Job.report))
        ).one_or_none()
        if original is None:
            _detach(session, job)
        else:
            copy_result(session, job, original)
    return len(found)


def detach_all(session: Session, job_id: str) -> None:
    """Detach the jobs that are attached to one that turned out to be different work. The caller holds its
    row."""
    for job in _lock(session, *_attached_to(job_id)):
        _detach(session, job)


def waits_for_worker() -> ColumnElement[bool]:
    """Whether a queued job, or the one that it is attached to, waits for a worker."""
    return _status_of_original().is_distinct_from(JobStatus.RUNNING)


def shares_files() -> ColumnElement[bool]:
    """Whether another job that is not deleted has the files that a job has."""
    other = aliased(Job)
    shared = select(other.id).where(
        other.manifest_key == Job.manifest_key, other.id != Job.id, other.deleted_at.is_(None)
    )
    return shared.limit(1).scalar_subquery().is_not(None)


def _status_of_original() -> ScalarSelect[JobStatus]:
    """A scalar is looked up in an index for each of few jobs; for EXISTS, PostgreSQL may read all jobs
    once."""
    original = aliased(Job)
    return select(original.status).where(original.id == Job.deduplicated_from).scalar_subquery()


def _ends_sooner(original: Job, job: Job) -> bool:
    """Whether a job in flight ends no later than this new one would: it runs, or is claimed no later."""
    claimed_sooner = original.priority >= job.priority and original.device_class == job.device_class
    return original.status == JobStatus.RUNNING or claimed_sooner


def _detach(session: Session, job: Job) -> None:
    original_id, job.deduplicated_from = job.deduplicated_from, None
    job.available_at = database.now(session)
    job.queue_deadline = deadline(job.available_at, job.max_queue_seconds)
    session.flush()
    data = {"device_class": job.device_class, "detached_from": original_id}
    events.append(session, job.id, "job_queued", data)


def _has_result() -> tuple[ColumnElement[bool], ...]:
    return Job.status == JobStatus.SUCCEEDED, Job.manifest_key.is_not(None), Job.deleted_at.is_(None)


def _succeeded(session: Session, project_id: str, keys: Iterable[str | None]) -> Sequence[Job]:
    """For each of these cache keys the newest job with a result, locked against being deleted."""
    newest = (
        select(func.max(Job.id))
        .where(Job.project_id == project_id, Job.cache_key.in_(keys), *_has_result())
        .group_by(Job.cache_key)
    )
    query = select(Job).where(Job.id.in_(newest), *_has_result())
    return session.scalars(query.with_for_update(read=True).options(undefer(Job.report))).all()


def _in_flight(session: Session, project_id: str, keys: Iterable[str | None]) -> Sequence[Job]:
    """Jobs in flight with these cache keys that are not attached themselves, locked against their end."""
    query = select(Job).where(
        Job.project_id == project_id,
        Job.cache_key.in_(keys),
        Job.status.in_(_IN_FLIGHT),
        Job.deduplicated_from.is_(None),
    )
    return session.scalars(query.order_by(Job.id).with_for_update(read=True)).all()


def _attached_to(job_id: str) -> tuple[ColumnElement[bool], ...]:
    return Job.status == JobStatus.QUEUED, Job.deduplicated_from == job_id


def _lock(session: Session, *conditions: ColumnElement[bool], limit: int | None = None) -> Sequence[Job]:
    """Jobs, locked. Those that another transaction has locked are left to `resolve_stranded`."""
    query = select(Job).where(*conditions).limit(limit).with_for_update(skip_locked=True, of=Job)
    return session.scalars(query.execution_options(populate_existing=True)).all()
