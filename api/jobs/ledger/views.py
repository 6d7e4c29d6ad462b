"""How a job is shown to those outside: in answers, and in messages to webhooks."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, WrapValidator
from sqlalchemy import inspect

from api.database import Columns
from api.jobs.ledger.models import DeviceClass, Job, JobStatus
from compression.recipe import Calibration, Evaluation, Recipe


class QualityGate(BaseModel):
    """A job whose compressed model is worse than this fails, with its report and without artifacts."""

    model_config = ConfigDict(extra="forbid")

    max_perplexity_ratio: float = Field(strict=True, gt=0, allow_inf_nan=False, examples=[1.05])


class JobError(BaseModel):
    """Why a job failed or expired."""

    code: str
    message: str


class JobBatch(BaseModel):
    """Which item of which batch a job was submitted as; `index` counts from 0."""

    id: str
    index: int


Stored = TypeVar("Stored", Recipe, Calibration, Evaluation)
AsStored = Annotated[Stored, WrapValidator(lambda stored, _: stored), SerializeAsAny()]
"""A field whose JSON is in the database: it is passed on as it is, not parsed and written again."""


class JobRead(BaseModel):
    """A job as it stands."""

    id: str = Field(examples=["job_06dk2m8x0c4q7tz9h3v5n1w8er"])
    name: str | None
    labels: dict[str, str]
    priority: int
    status: JobStatus
    phase: str | None
    layers_done: int
    layers_total: int
    model: str
    dataset: str | None = Field(description="Where the dataset is, or how many inline texts it has.")
    scheme: str
    method: str
    recipe: AsStored[Recipe]
    calibration: AsStored[Calibration]
    evaluation: AsStored[Evaluation]
    quality_gate: QualityGate | None
    device_class: DeviceClass
    max_runtime_seconds: int | None
    max_queue_seconds: int | None
    callback: str | None = Field(description="The webhook that gets messages about this job.")
    output: str | None = Field(description="Below which prefix in S3 its files are copied to.")
    attempts_made: int
    event_seq: int = Field(description="The seq of its last event; it grows with every change.")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: JobError | None
    batch: JobBatch | None
    deduplicated_from: str | None = Field(
        description="The job whose result this one has or, while it is queued, waits for."
    )

    @classmethod
    def of(cls, job: Job | Columns, **more: Any) -> Self:
        """From the row, and fields that are not in it."""
        same = {name: getattr(job, name) for name in _SAME}
        error = JobError(code=job.error_code, message=job.error_message or "") if job.error_code else None
        batch = None
        if job.batch_id is not None and job.batch_index is not None:
            batch = JobBatch(id=job.batch_id, index=job.batch_index)
        made = {"dataset": job.dataset_label, "error": error, "batch": batch}
        return cls.model_validate({**same, **made, **more})


_SAME = JobRead.model_fields.keys() & set(inspect(Job).columns.keys()) - {"dataset"}
"""Fields that are columns."""


class JobData(BaseModel):
    """What a message is about."""

    job: JobRead


class JobMessage(BaseModel):
    """The body that webhooks get. `type` is the event's, with a full stop: job.succeeded, attempt.started.

    `data.job` is the job as it was after the event.
    """

    type: str
    timestamp: datetime
    data: JobData

    @classmethod
    def of(cls, event: str, at: datetime, job: Job) -> Self:
        """The message of an event of that type, about a job as it is now."""
        return cls(type=event.replace("_", ".", 1), timestamp=at, data=JobData(job=JobRead.of(job)))
