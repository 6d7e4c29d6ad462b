"""The worker's side of a job: claim it, renew its lease, report progress, end it.

A claim gives a lease with a fencing token. Every write repeats the token, so a worker that lost its lease
(slow, partitioned, taken for dead) cannot touch a job that another one has since claimed: it gets LeaseLost
and stops. All functions write in the caller's transaction and never commit. Times are the database's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, func, or_, select, true, update
from sqlalchemy.orm import Session, undefer_group

from api import database
from api.jobs.ledger import events
from api.jobs.ledger.models import ACTIVE, Attempt, AttemptOutcome, Job, JobLayer, JobStatus
from api.jobs.queue import deduplication, quotas
from api.jobs.queue.attempts import (
    NO_FACTS,
    AttemptFacts,
    end_attempt,
    end_counted,
    end_uncounted,
    postponed_backoff,
    postponed_in_a_row,
)
from api.jobs.queue.workers import WorkerIdentity
from compression.events import Phase

_LAYER_EVENT_FIELDS = ("layer", "layers_total", "relative_error", "seconds", "eta_seconds")


class LeaseLost(Exception):
    """The fence refused a write: another attempt owns the job, or it has ended. Stop at once."""


class CancelWon(LeaseLost):
    """A success came after a cancel: remove what was uploaded, then `mark_cancelled`."""


@dataclass(frozen=True)
class Lease:
    """The right to write to a job. attempt: the attempt's number; token: the fencing token."""

    job_id: str
    attempt: int
    token: int
    worker_id: str


def claim(
    session: Session, worker: WorkerIdentity, lease_seconds: float, *, max_running: int | None = None
) -> tuple[Lease, Job] | None:
    """Take the best waiting job that this worker can run: highest priority, then oldest; None without one.

    Writes the attempt's row and its event in the same transaction. A job for `any` device keeps the device
    class of its first attempt, since another one would not give the same bytes. max_running: how many jobs of
    a project run at once that has no limit of its own.
    """
    quotas.hold_limited(session, max_running)
    now = database.now(session)
    fits_gpu = Job.required_gpu_bytes <= worker.gpu_bytes if worker.device_class == "cuda" else true()
    best = (
        select(Job.id)
        .where(
            Job.status == JobStatus.QUEUED,
            Job.available_at <= now,
            Job.device_class.in_(("any", worker.device_class)),
            Job.required_host_bytes <= worker.host_bytes,
            fits_gpu,
            or_(Job.queue_deadline.is_(None), Job.queue_deadline > now),
            Job.project_id.not_in(quotas.full_projects(max_running)),
            Job.deduplicated_from.is_(None),
        )
        .order_by(Job.priority.desc(), Job.created_at, Job.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    claimed = session.execute(
        update(Job)
        .where(Job.id == best, Job.status == JobStatus.QUEUED)
        .values(
            status=JobStatus.RUNNING,
            phase=None,
            device_class=worker.device_class,
            lease_owner=worker.id,
            lease_token=Job.lease_token + 1,
            lease_until=now + timedelta(seconds=lease_seconds),
            attempts_made=Job.attempts_made + 1,
            started_at=func.coalesce(Job.started_at, now),
        )
        .returning(Job.id, Job.attempts_made, Job.lease_token)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    if claimed is None:
        return None
    lease = Lease(claimed.id, claimed.attempts_made, claimed.lease_token, worker.id)
    session.add(
        Attempt(
            job_id=lease.job_id,
            number=lease.attempt,
            token=lease.token,
            worker_id=worker.id,
            device_class=worker.device_class,
            started_at=now,
        )
    )
    data = {"worker": worker.id, "device_class": worker.device_class}
    append_event(session, lease, "attempt_started", data)
    job = session.get_one(Job, lease.job_id, options=[undefer_group("work")], populate_existing=True)
    return lease, job


def renew(session: Session, lease: Lease, lease_seconds: float) -> JobStatus:
    """Keep the lease for `lease_seconds` more. Returns running, or cancelling: stop, then mark_cancelled."""
    until = database.now(session) + timedelta(seconds=lease_seconds)
    return _fenced_update(session, lease, lease_until=until)


def status_of(session: Session, lease: Lease) -> JobStatus:
    """The status of the lease's job, running or cancelling. Only reads.

    Raises:
        LeaseLost: the lease is not held any more.
    """
    found = session.execute(
        select(Job.status).where(Job.id == lease.job_id, *_fence(lease))
    ).scalar_one_or_none()
    if found is None:
        raise LeaseLost(lease)
    return found


def set_phase(session: Session, lease: Lease, phase: Phase) -> None:
    """Enter a phase, with its event."""
    _fenced_update(session, lease, phase=phase)
    append_event(session, lease, "phase_changed", {"phase": phase})


def save_plan(session: Session, lease: Lease, header: dict[str, Any]) -> None:
    """Save the resolved plan of the first attempt, which later attempts follow.

    A header with another work_key (the source or the engine changed) replaces it, with a warning event, and
    layers of the old one no longer count. The same work_key under another fingerprint changes nothing here:
    the engine then reports `bytes_may_differ`.
    """
    _fenced_update(session, lease)
    known = session.execute(select(Job.work_key).where(Job.id == lease.job_id)).scalar_one()
    work_key = header["work_key"]
    if known == work_key:
        return
    done = session.execute(
        select(func.count()).where(JobLayer.job_id == lease.job_id, JobLayer.work_key == work_key)
    ).scalar_one()
    _fenced_update(
        session,
        lease,
        work_key=work_key,
        fingerprint=header["fingerprint"],
        resolved_plan=header,
        layers_done=done,
    )
    if known is not None:
        message = "The source, the dataset or the engine changed since the last attempt; it starts over."
        append_event(session, lease, "warning", {"code": "plan_changed", "message": message})


def save_cache_key(session: Session, lease: Lease, key: str | None) -> None:
    """Save the cache key that the worker found. If it differs from the known one, duplicates are detached."""
    _fenced_update(session, lease)
    known = session.execute(select(Job.cache_key).where(Job.id == lease.job_id)).scalar_one()
    if known != key:
        _fenced_update(session, lease, cache_key=key)
        deduplication.detach_all(session, lease.job_id)


def pin_dataset(session: Session, lease: Lease, dataset: dict[str, Any]) -> None:
    """Save the version of the dataset that the first attempt found, so that later ones read the same."""
    _fenced_update(session, lease, dataset=dataset)


def append_event(session: Session, lease: Lease, type: str, data: dict[str, Any]) -> int:
    """Add an event of this attempt and return its seq."""
    seq = events.append(session, lease.job_id, type, data, attempt=lease.attempt, where=_fence(lease))
    if seq is None:
        raise LeaseLost(lease)
    return seq


def record_layer(session: Session, lease: Lease, layer_event_data: dict[str, Any], store_key: str) -> None:
    """Finish a layer: its row and its `layer_solved` event, together.

    layer_event_data: the data of `compression.events.LayerSolved`. store_key: where its shard now is. A layer
    solved again, since its shard was lost from the store, replaces its row; its event was stored before.
    """
    _fenced_update(session, lease)
    work_key, fingerprint = session.execute(
        select(Job.work_key, Job.fingerprint).where(Job.id == lease.job_id)
    ).one()
    if work_key is None:
        raise ValueError("a layer was finished before the resolved plan was saved")
    entry = layer_event_data["entry"]
    number = layer_event_data["layer"]
    known = session.get(JobLayer, (lease.job_id, work_key, number))
    row = known or JobLayer(job_id=lease.job_id, work_key=work_key, layer=number, fingerprint=fingerprint)
    row.attempt = lease.attempt
    row.store_key = store_key
    row.sha256 = entry["sha256"]
    row.size = entry["size"]
    row.entry = entry
    row.at = database.now(session)
    if known is None:
        session.add(row)
        _fenced_update(session, lease, layers_done=Job.layers_done + 1)
        data = {name: layer_event_data[name] for name in _LAYER_EVENT_FIELDS}
        append_event(session, lease, "layer_solved", data)
    session.flush()


def finished_layers(session: Session, job_id: str, work_key: str) -> list[JobLayer]:
    """The layers that earlier attempts finished under this work_key, in order."""
    return list(
        session.scalars(
            select(JobLayer)
            .where(JobLayer.job_id == job_id, JobLayer.work_key == work_key)
            .order_by(JobLayer.layer)
        )
    )


def succeed(
    session: Session,
    lease: Lease,
    report: dict[str, Any],
    manifest_key: str,
    facts: AttemptFacts = NO_FACTS,
) -> None:
    """End the job with its published artifacts, and its duplicates. A second call changes nothing: the answer
    to the first may have been lost.

    Raises:
        CancelWon: a cancel came first.
        LeaseLost: the job is another's.
    """
    published = session.execute(select(Job.manifest_key).where(Job.id == lease.job_id)).scalar_one_or_none()
    if published == manifest_key:  # the key has the lease's token
        return
    status = _fenced_update(session, lease)
    if status != JobStatus.RUNNING:
        raise CancelWon(lease)
    end_attempt(session, lease.job_id, lease.attempt, AttemptOutcome.SUCCEEDED, facts=facts)
    data = {"totals": report.get("totals")}
    _finish(session, lease, JobStatus.SUCCEEDED, data, report=report, manifest_key=manifest_key)
    deduplication.finish_attached(session, lease.job_id)


def fail(
    session: Session,
    lease: Lease,
    outcome: AttemptOutcome,
    code: str,
    message: str,
    *,
    retryable: bool,
    report: dict[str, Any] | None = None,
    facts: AttemptFacts = NO_FACTS,
) -> JobStatus:
    """End the attempt, counted: the job waits again if `retryable` and attempts are left, else it has failed.

    A job that is being cancelled ends cancelled. report: kept with a failed job (one that missed its quality
    gate). Returns the job's new status.
    """
    _fenced_update(session, lease)
    status = end_counted(
        session, lease.job_id, lease.attempt, outcome, code, message, facts, retryable=retryable
    )
    if status == JobStatus.FAILED and report is not None:
        session.execute(
            update(Job)
            .where(Job.id == lease.job_id)
            .values(report=report)
            .execution_options(synchronize_session=False)
        )
    return status


def mark_cancelled(session: Session, lease: Lease, facts: AttemptFacts = NO_FACTS) -> None:
    """End a job that is being cancelled, after its engine has stopped. Finished layers stay for a retry."""
    _fenced_update(session, lease, (JobStatus.CANCELLING,))
    end_attempt(session, lease.job_id, lease.attempt, AttemptOutcome.CANCELLED, facts=facts)
    _finish(session, lease, JobStatus.CANCELLED, {})


def release(session: Session, lease: Lease, facts: AttemptFacts = NO_FACTS) -> JobStatus:
    """Give the job back, not counted: this worker shuts down. Returns queued or cancelled."""
    _fenced_update(session, lease)
    return end_uncounted(session, lease.job_id, lease.attempt, AttemptOutcome.PREEMPTED, facts)


def postpone(
    session: Session,
    lease: Lease,
    outcome: AttemptOutcome,
    code: str,
    message: str,
    facts: AttemptFacts = NO_FACTS,
) -> JobStatus:
    """Give the job back, not counted: what it needs beside itself is missing. Returns queued or cancelled.

    The next attempt may meet the same, so the job is not claimed for a while, longer each time in a row.
    outcome: one of POSTPONED.
    """
    _fenced_update(session, lease)
    return end_uncounted(
        session,
        lease.job_id,
        lease.attempt,
        outcome,
        facts,
        why=(code, message),
        delay_seconds=postponed_backoff(postponed_in_a_row(session, lease.job_id)),
    )


def queued_by_device(session: Session, *, max_running: int | None = None) -> dict[str, int]:
    """How many jobs could be claimed now, by device class (`any` among them). max_running: as for `claim`."""
    counts = session.execute(
        select(Job.device_class, func.count().label("jobs"))
        .where(
            Job.status == JobStatus.QUEUED,
            Job.available_at <= database.now(session),
            Job.project_id.not_in(quotas.full_projects(max_running)),
            Job.deduplicated_from.is_(None),
        )
        .group_by(Job.device_class)
    )
    return {row.device_class: row.jobs for row in counts}


def _fence(lease: Lease, statuses: Sequence[JobStatus] = ACTIVE) -> tuple[ColumnElement[bool], ...]:
    return (Job.lease_token == lease.token, Job.status.in_(statuses))


def _fenced_update(
    session: Session, lease: Lease, statuses: Sequence[JobStatus] = ACTIVE, **values: Any
) -> JobStatus:
    """Write to the job's row through the fence and hold the row until the transaction ends."""
    status = session.execute(
        update(Job)
        .where(Job.id == lease.job_id, *_fence(lease, statuses))
        .values(lease_token=lease.token, **values)
        .returning(Job.status)
        .execution_options(synchronize_session=False)
    ).scalar_one_or_none()
    if status is None:
        raise LeaseLost(lease)
    return status


def _finish(session: Session, lease: Lease, status: JobStatus, data: dict[str, Any], **values: Any) -> None:
    """End the job, then store the event, so that its message shows a job that has ended."""
    _fenced_update(
        session,
        lease,
        status=status,
        phase=None,
        lease_owner=None,
        lease_until=None,
        finished_at=database.now(session),
        error_code=None,
        error_message=None,
        **values,
    )
    events.append(session, lease.job_id, f"job_{status.value}", data, attempt=lease.attempt)
