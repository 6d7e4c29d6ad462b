"""What the jobs routes answer, but for the job itself (ledger/views.py) and an estimate (estimates.py)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from api.database import Columns
from api.jobs.ledger.models import AttemptOutcome, DeviceClass, JobStatus
from api.jobs.ledger.views import JobRead
from api.jobs.queue.scheduling import Obstacle


class AttemptRead(BaseModel):
    """One try of a worker. `outcome` is null while it runs; preempted attempts do not count."""

    number: int
    worker_id: str
    device_class: str
    started_at: datetime
    ended_at: datetime | None
    seconds: float | None
    outcome: AttemptOutcome | None
    error_code: str | None
    error_message: str | None
    exit_signal: int | None
    peak_host_bytes: int | None
    peak_gpu_bytes: int | None


class JobOutline(BaseModel):
    """What a submission would become, in short."""

    model: str
    scheme: str
    method: str
    layers_total: int
    device_class: DeviceClass


class JobPlanned(JobOutline):
    """What a submission would become: nothing is stored, no job exists."""

    plan: dict[str, Any] = Field(
        description="What would be done: every module's treatment, memory, disk, warnings."
    )


class JobProgress(JobRead):
    """A job with its attempts."""

    obstacle: Obstacle | None = Field(description="Why no worker that is alive takes it while it is queued.")
    attempts: list[AttemptRead]

    @classmethod
    def of_rows(cls, rows: Sequence[Columns], obstacle: Obstacle | None) -> Self:
        """From a row for each attempt, or one without."""
        made = rows if rows[0].attempts_made else ()
        names = {name: f"attempt_{name}" for name in AttemptRead.model_fields}
        attempts = [{name: getattr(row, column) for name, column in names.items()} for row in made]
        return cls.of(rows[0], obstacle=obstacle, attempts=attempts)


class JobDetail(JobProgress):
    """A job with its attempts and its plan."""

    plan: dict[str, Any] = Field(
        description="What was decided at submission: every module's treatment, memory, disk, warnings. "
        "The same whatever the seed."
    )


class JobPage(BaseModel):
    """Jobs, in the order that `sort` says, the newest first by default. `next_cursor` is null on the last
    page."""

    items: list[JobRead]
    next_cursor: str | None


class EventRead(BaseModel):
    """Something that happened. seq counts from 1 without a gap."""

    model_config = ConfigDict(from_attributes=True)

    seq: int
    at: datetime
    attempt: int | None
    type: str = Field(examples=["layer_solved"])
    data: dict[str, Any]


class EventPage(BaseModel):
    """Events after `since`, in order. Ask again with since = next_since until the status is a last one."""

    items: list[EventRead]
    next_since: int
    status: JobStatus
