"""Jobs that are the same work: what one of them has made, the others have as well.

    new, or claimed ──▶ another has succeeded ──▶ succeeded at once, with its files and report
                   └──▶ another is in flight ───▶ queued, attached: no worker takes it
                                                   │ the other succeeds: so does this one
                                                   └ the other ends in any other way, or turns out to be
                                                     about something else: this one goes its own way

A job is attached while it is queued and names another in deduplicated_from. All functions write in the
caller's transaction. Who looks for a twin holds the project first, so that of two who look at once one sees
the other; the rows that are found are held against their end until the transaction is over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from sqlalchemy import ColumnElement, ScalarSelect, func, select
from sqlalchemy.orm import Session, aliased, undefer

from api import database
from api.jobs.ledger import events
from api.jobs.ledger.models import AttemptOutcome, Job, JobStatus
from api.jobs.queue.attempts import deadline, end_attempt, let_go

_IN_FLIGHT = (JobStatus.QUEUED, JobStatus.RUNNING)


def hold(session: Session, project_id: str) -> None:
    """Be the only one who looks for twins in this project. Comes before any row is held."""
    database.lock(session, f"{project_id} twins")


def attach_new(session: Session, jobs: Sequence[Job]) -> list[tuple[Job, Job]]:
    """Let jobs of one project that are about to be stored take what others made or are making, also among
    themselves. Returns those whose twin has succeeded, with it: once stored they are to `reuse` it."""
    keyed = [job for job in jobs if job.cache_key is not None]
    if not keyed:
        return []
    project_id = keyed[0].project_id
    hold(session, project_id)
    keys = {job.cache_key for job in keyed if looks(job)}
    in_flight = defaultdict(list)
    for twin in _held(session, project_id, keys):
        in_flight[twin.cache_key].append(twin)
    done = {twin.cache_key: twin for twin in _succeeded(session, project_id, keys)}
    reused = []
    for job in keyed:
        if looks(job):
            if job.cache_key in done:
                job.deduplicated_from = done[job.cache_key].id
                reused.append((job, done[job.cache_key]))
                continue
            ahead = (twin for twin in in_flight[job.cache_key] if _is_ahead(twin, job))
            job.deduplicated_from = next((twin.id for twin in ahead), None)
        if job.deduplicated_from is None:
            in_flight[job.cache_key].append(job)
    return reused


def looks(job: Job) -> bool:
    """Whether a job takes what others make. One whose files are copied elsewhere makes them itself."""
    return job.cache == "use" and job.output is None


def take(session: Session, job_id: str, attempt: int) -> bool:
    """End an attempt at a job of which another has the result, or makes it now. False: nobody does.

    The caller holds the project, then the job's row, with its key in it.
    """
    job = session.get_one(Job, job_id, populate_existing=True)
    others = (twin for twin in _held(session, job.project_id, [job.cache_key]) if twin.id != job_id)
    running = next((twin for twin in others if twin.status == JobStatus.RUNNING), None)
    done = next(iter(_succeeded(session, job.project_id, [job.cache_key])), None)
    twin = done or running
    if twin is None:
        return False
    end_attempt(session, job_id, attempt, AttemptOutcome.DEDUPLICATED)
    let_go(session, job_id)
    job.deduplicated_from = twin.id
    if twin is done:
        reuse(session, job, twin)
    else:
        job.status = JobStatus.QUEUED
        session.flush()
    return True


def reuse(session: Session, job: Job, twin: Job) -> None:
    """End a job with the result of one that has succeeded, and those that wait for it. Holds both rows."""
    job.status = JobStatus.SUCCEEDED
    job.deduplicated_from = twin.id
    job.layers_done = job.layers_total
    job.report, job.manifest_key = twin.report, twin.manifest_key
    job.error_code = job.error_message = None
    job.finished_at = database.now(session)
    session.flush()
    totals = (twin.report or {}).get("totals")
    events.append(session, job.id, "job_succeeded", {"totals": totals, "deduplicated_from": twin.id})
    settle(session, job.id)


def settle(session: Session, job_id: str) -> None:
    """Give the result of a job that has succeeded to those that wait for it. Holds its row."""
    waiting = _lock(session, *_attached(job_id))
    if waiting:
        twin = session.get_one(Job, job_id, options=[undefer(Job.report)], populate_existing=True)
        for job in waiting:
            reuse(session, job, twin)


def left_alone() -> tuple[ColumnElement[bool], ...]:
    """Which jobs wait for one that is no longer in flight."""
    gone = func.coalesce(_twins_status(), JobStatus.FAILED).not_in(_IN_FLIGHT)
    return Job.status == JobStatus.QUEUED, Job.deduplicated_from.is_not(None), gone


def settle_rest(session: Session, limit: int) -> int:
    """See to jobs that were left alone, at most `limit`. Returns how many there were."""
    waiting = _lock(session, *left_alone(), limit=limit)
    for job in waiting:
        query = select(Job).where(Job.id == job.deduplicated_from, *_is_shareable())
        done = session.scalars(query.with_for_update(read=True).options(undefer(Job.report))).one_or_none()
        if done is None:
            _detach(session, job)
        else:
            reuse(session, job, done)
    return len(waiting)


def detach(session: Session, job_id: str) -> None:
    """Let those that wait for a job go their own way, since it is about something else. Holds its row."""
    for job in _lock(session, *_attached(job_id)):
        _detach(session, job)


def waits_for_worker() -> ColumnElement[bool]:
    """Whether a queued job waits for a worker, or for a job that does: not for one that a worker has."""
    return _twins_status().is_distinct_from(JobStatus.RUNNING)


def shares_files() -> ColumnElement[bool]:
    """Whether another job that is not deleted has the files that a job has."""
    other = aliased(Job)
    shared = select(other.id).where(
        other.manifest_key == Job.manifest_key, other.id != Job.id, other.deleted_at.is_(None)
    )
    return shared.limit(1).scalar_subquery().is_not(None)


def _twins_status() -> ScalarSelect[JobStatus]:
    """Of the job that a job names. A value is looked up in an index for each of few jobs; for EXISTS,
    PostgreSQL may read all jobs once."""
    twin = aliased(Job)
    return select(twin.status).where(twin.id == Job.deduplicated_from).scalar_subquery()


def _is_ahead(twin: Job, job: Job) -> bool:
    """Whether a job in flight ends no later than this new one would."""
    waits_as_long = twin.priority >= job.priority and twin.device_class == job.device_class
    return twin.status == JobStatus.RUNNING or waits_as_long


def _detach(session: Session, job: Job) -> None:
    left, job.deduplicated_from = job.deduplicated_from, None
    job.available_at = database.now(session)
    job.queue_deadline = deadline(job.available_at, job.max_queue_seconds)
    session.flush()
    told = {"device_class": job.device_class, "detached_from": left}
    events.append(session, job.id, "job_queued", told)


def _is_shareable() -> tuple[ColumnElement[bool], ...]:
    return Job.status == JobStatus.SUCCEEDED, Job.manifest_key.is_not(None), Job.deleted_at.is_(None)


def _succeeded(session: Session, project_id: str, keys: Iterable[str | None]) -> Sequence[Job]:
    """For each of these keys the newest job that has succeeded, held against being deleted."""
    newest = (
        select(func.max(Job.id))
        .where(Job.project_id == project_id, Job.cache_key.in_(keys), *_is_shareable())
        .group_by(Job.cache_key)
    )
    query = select(Job).where(Job.id.in_(newest), *_is_shareable())
    return session.scalars(query.with_for_update(read=True).options(undefer(Job.report))).all()


def _held(session: Session, project_id: str, keys: Iterable[str | None]) -> Sequence[Job]:
    """Jobs in flight with these keys that are not attached themselves, held against their end."""
    query = select(Job).where(
        Job.project_id == project_id,
        Job.cache_key.in_(keys),
        Job.status.in_(_IN_FLIGHT),
        Job.deduplicated_from.is_(None),
    )
    return session.scalars(query.order_by(Job.id).with_for_update(read=True)).all()


def _attached(job_id: str) -> tuple[ColumnElement[bool], ...]:
    return Job.status == JobStatus.QUEUED, Job.deduplicated_from == job_id


def _lock(session: Session, *conditions: ColumnElement[bool], limit: int | None = None) -> Sequence[Job]:
    """Jobs, held; those that another transaction holds are left to `settle_rest`."""
    query = select(Job).where(*conditions).limit(limit).with_for_update(skip_locked=True, of=Job)
    return session.scalars(query.execution_options(populate_existing=True)).all()
