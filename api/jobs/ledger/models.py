"""Tables: jobs, the batches that they came in, their plans, attempts, events and finished layers."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from sqlalchemy import JSON, BigInteger, Enum, ForeignKey, Index, String, Text, desc, text
from sqlalchemy.orm import Mapped, mapped_column

from api.database import Base
from api.projects.models import Project

DeviceClass = Literal["any", "cpu", "cuda"]
"""What a job may run on."""


class JobStatus(StrEnum):
    """queued -> running -> succeeded | failed | cancelled | expired, with cancelling between."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


ACTIVE = (JobStatus.RUNNING, JobStatus.CANCELLING)
"""A worker holds the job's lease."""
TERMINAL = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED)
CANCELLABLE = (JobStatus.QUEUED, JobStatus.RUNNING)
RETRYABLE = (JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED)


class AttemptOutcome(StrEnum):
    """How an attempt ended. Of these, preempted, store_lost, host_failed and deduplicated are not counted
    toward max_attempts."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    CRASHED = "crashed"
    TIMED_OUT = "timed_out"
    OUT_OF_MEMORY = "out_of_memory"
    LEASE_LOST = "lease_lost"
    PREEMPTED = "preempted"
    STORE_LOST = "store_lost"
    HOST_FAILED = "host_failed"
    DEDUPLICATED = "deduplicated"


POSTPONED = (AttemptOutcome.STORE_LOST, AttemptOutcome.HOST_FAILED)
"""The job was given back since the store, or the worker's host, did not do its part."""


def _values(members: type[StrEnum]) -> list[str]:
    return [member.value for member in members]


def _enum(kind: type[StrEnum]) -> Enum:
    """A string column on every database: adding a member needs no migration."""
    return Enum(kind, native_enum=False, length=16, values_callable=_values)


def _where(condition: str) -> dict[str, Any]:
    """A partial index: of the rows for which this is true."""
    return {"postgresql_where": text(condition), "sqlite_where": text(condition)}


class Batch(Base):
    """Jobs that were submitted together; each says of which item of which batch it was made.

    accepted, refused: how many items became jobs, and how many did not.
    refusals: {"index", "error"} of the latter, in order. Plain JSON, since an error may quote a NUL, which
    PostgreSQL's JSONB does not take.
    """

    __tablename__ = "batches"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey(Project.id))
    name: Mapped[str | None] = mapped_column(String(200))
    labels: Mapped[dict[str, str]]
    accepted: Mapped[int]
    refused: Mapped[int]
    refusals: Mapped[list[dict[str, Any]]] = mapped_column(JSON, deferred=True)
    created_at: Mapped[datetime]

    __table_args__ = (Index("ix_batches_list", "project_id", "created_at", "id"),)


class StoredPlan(Base):
    """A plan (`Plan.to_dict`, without the seed). Jobs with equal plans share a row, because the plan of a
    large model is long and a sweep has hundreds of jobs. The row is removed with the last of its jobs.

    document: JSON, stored as text because no query looks into it. id: the SHA-256 of the document.
    """

    __tablename__ = "plans"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    document: Mapped[str] = mapped_column(Text)


class Job(Base):
    """One compression: what was asked for, and how far it has come.

    model: as the caller wrote it; source: the folder or the commit it resolved to.
    recipe, dataset, calibration, evaluation: JSON of the classes in `compression.recipe`.
    quality_gate: {"max_perplexity_ratio": float}, held against the report by the worker.
    plan_id: the plan that was made at submission.
    resolved_plan: the first line of the engine's journal, obeyed by later attempts.
    device_class: cpu, cuda or any; fixed by the first attempt.
    attempts_made: numbers the attempts. attempts_counted: what max_attempts limits; a retry resets it.
    queue_deadline: when a job that still waits expires.
    output: where its files are copied to, below <job>/<token>/; `s3://bucket` or a folder there.
    callback: a webhook that gets this job's messages even if it does not get those of all jobs. It may have
    been deleted since.
    manifest_key: where the published manifest is; readers trust this row, not the store's listing. Jobs that
    share a result share it.
    batch_id, batch_index: which item of which batch it was submitted as.
    cache: whether it may take another job's result: use or bypass. cache_key: equal for jobs that do the same
    work (submission/cache_keys.py); null until all digests are known. deduplicated_from: the job whose result
    it has or, while it is queued, waits for (queue/deduplication.py).
    traceparent: the span of the request that queued it last, where traces are made.
    deleted_at: from then on nobody sees the job. Workers remove its files first, then its row.
    """

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey(Project.id))
    batch_id: Mapped[str | None] = mapped_column(ForeignKey(Batch.id))
    batch_index: Mapped[int | None]
    name: Mapped[str | None] = mapped_column(String(200))
    labels: Mapped[dict[str, str]]
    priority: Mapped[int]

    model: Mapped[str] = mapped_column(Text)
    source: Mapped[str] = mapped_column(Text)
    dataset_label: Mapped[str | None] = mapped_column(Text)
    scheme: Mapped[str] = mapped_column(String(120))
    method: Mapped[str] = mapped_column(String(120))
    recipe: Mapped[dict[str, Any]]
    dataset: Mapped[dict[str, Any] | None] = mapped_column(deferred=True, deferred_group="work")
    calibration: Mapped[dict[str, Any]]
    evaluation: Mapped[dict[str, Any]]
    quality_gate: Mapped[dict[str, Any] | None]
    require: Mapped[str | None] = mapped_column(String(16))
    max_runtime_seconds: Mapped[int | None]
    max_queue_seconds: Mapped[int | None]
    callback: Mapped[str | None] = mapped_column(String(40))
    output: Mapped[str | None] = mapped_column(Text)
    max_attempts: Mapped[int]
    plan_id: Mapped[str] = mapped_column(ForeignKey(StoredPlan.id), nullable=True)  # see migration 0010

    device_class: Mapped[str] = mapped_column(String(8))
    required_host_bytes: Mapped[int] = mapped_column(BigInteger)
    required_gpu_bytes: Mapped[int] = mapped_column(BigInteger)

    status: Mapped[JobStatus] = mapped_column(_enum(JobStatus))
    phase: Mapped[str | None] = mapped_column(String(16))
    layers_done: Mapped[int] = mapped_column(default=0)
    layers_total: Mapped[int]
    event_seq: Mapped[int] = mapped_column(default=0)
    attempts_made: Mapped[int] = mapped_column(default=0)
    attempts_counted: Mapped[int] = mapped_column(default=0)

    created_at: Mapped[datetime]
    available_at: Mapped[datetime]
    queue_deadline: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    lease_owner: Mapped[str | None] = mapped_column(String(200))
    lease_token: Mapped[int] = mapped_column(BigInteger, default=0)
    lease_until: Mapped[datetime | None]
    traceparent: Mapped[str | None] = mapped_column(String(55))

    work_key: Mapped[str | None] = mapped_column(String(64))
    fingerprint: Mapped[str | None] = mapped_column(String(64))
    resolved_plan: Mapped[dict[str, Any] | None] = mapped_column(deferred=True, deferred_group="work")

    report: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)
    manifest_key: Mapped[str | None] = mapped_column(Text)
    error_code: Mapped[str | None] = mapped_column(String(80))
    error_message: Mapped[str | None] = mapped_column(Text)
    cache: Mapped[str] = mapped_column(String(8), default="use", server_default="use")
    cache_key: Mapped[str | None] = mapped_column(String(64))
    deduplicated_from: Mapped[str | None] = mapped_column(String(40))
    deleted_at: Mapped[datetime | None]

    # No column that changes while a job runs is in an index (event_seq, layers_done, lease_until), so that
    # events and renewed leases are HOT updates on PostgreSQL. Who holds a lease is found by status.
    __table_args__ = (
        # Metrics on jobs that ended are answered from this index alone.
        Index("ix_jobs_ended", "status", "finished_at", "device_class"),
        Index("ix_jobs_cache", "project_id", "cache_key", **_where("cache_key IS NOT NULL")),
        Index("ix_jobs_twin", "status", "deduplicated_from", **_where("deduplicated_from IS NOT NULL")),
        Index("ix_jobs_manifest", "manifest_key", **_where("manifest_key IS NOT NULL")),
        # The last four columns are there so that sweeps and metrics are answered from the index alone: a row
        # is long, and on SQLite its last columns may lie behind a long report.
        Index(
            "ix_jobs_claim",
            "status",
            desc("priority"),
            "created_at",
            "id",
            "device_class",
            "available_at",
            "project_id",
            "deduplicated_from",
        ),
        Index("ix_jobs_deadline", "status", "queue_deadline", **_where("queue_deadline IS NOT NULL")),
        Index("ix_jobs_list", "project_id", "created_at", "id"),
        Index("ix_jobs_list_status", "project_id", "status", "created_at", "id"),
        Index("ix_jobs_list_model", "project_id", "model", "created_at", "id"),
        # On PostgreSQL only: SQLite scans a project's jobs in the order of the list. fastupdate is off,
        # because with it every query reads through the rows that were added lately.
        Index(
            "ix_jobs_labels",
            "labels",
            postgresql_using="gin",
            postgresql_ops={"labels": "jsonb_path_ops"},
            postgresql_with={"fastupdate": "off"},
        ),
        # Counts and pages of a batch are answered from this index alone.
        Index("ix_jobs_batch", "batch_id", "batch_index", "status", "deleted_at", "id"),
        Index("ix_jobs_deleted_at", "deleted_at", **_where("deleted_at IS NOT NULL")),
        Index("ix_jobs_plan_id", "plan_id"),
    )


class Attempt(Base):
    """One try of a worker at a job. outcome is null while it runs; seconds and times are the database's."""

    __tablename__ = "attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey(Job.id, ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[int] = mapped_column(BigInteger)
    worker_id: Mapped[str] = mapped_column(String(200))
    device_class: Mapped[str] = mapped_column(String(8))
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    seconds: Mapped[float | None]
    outcome: Mapped[AttemptOutcome | None] = mapped_column(_enum(AttemptOutcome))
    error_code: Mapped[str | None] = mapped_column(String(80))
    error_message: Mapped[str | None] = mapped_column(Text)
    exit_signal: Mapped[int | None]
    peak_host_bytes: Mapped[int | None] = mapped_column(BigInteger)
    peak_gpu_bytes: Mapped[int | None] = mapped_column(BigInteger)

    __table_args__ = (Index("ix_attempts_ended", "ended_at", "outcome"),)


class JobEvent(Base):
    """What happened, in order: seq counts from 1 without a gap within a job."""

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey(Job.id, ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime]
    attempt: Mapped[int | None]
    type: Mapped[str] = mapped_column(String(40))
    data: Mapped[dict[str, Any]]


class JobLayer(Base):
    """A finished layer: its shard is in the store under store_key. These rows are the journal.

    entry: the engine's journal line (file, sha256, size, report rows), written back for a later attempt.
    """

    __tablename__ = "job_layers"

    job_id: Mapped[str] = mapped_column(ForeignKey(Job.id, ondelete="CASCADE"), primary_key=True)
    work_key: Mapped[str] = mapped_column(String(64), primary_key=True)
    layer: Mapped[int] = mapped_column(primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    attempt: Mapped[int]
    store_key: Mapped[str] = mapped_column(Text)
    sha256: Mapped[str] = mapped_column(String(64))
    size: Mapped[int] = mapped_column(BigInteger)
    entry: Mapped[dict[str, Any]]
    at: Mapped[datetime] = mapped_column(index=True)


class IdempotencyKey(Base):
    """A key that a caller sent with a submission. resource_id: of the job or batch that it made."""

    __tablename__ = "idempotency_keys"

    project_id: Mapped[str] = mapped_column(ForeignKey(Project.id, ondelete="CASCADE"), primary_key=True)
    route: Mapped[str] = mapped_column(String(80), primary_key=True)
    key: Mapped[str] = mapped_column(String(200), primary_key=True)
    body_sha256: Mapped[str] = mapped_column(String(64))
    resource_id: Mapped[str] = mapped_column(String(40), index=True)
    created_at: Mapped[datetime] = mapped_column(index=True)


class FileDigest(Base):
    """The sha256 of a file, good for as long as the file's stamp (submission/cache_keys.py) is the same."""

    __tablename__ = "file_digests"

    stamp: Mapped[str] = mapped_column(String(64), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64))
    at: Mapped[datetime] = mapped_column(index=True)
