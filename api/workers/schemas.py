"""What the workers route answers."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, Field

from api.jobs.ledger.models import DeviceClass


class WorkerRead(BaseModel):
    """A worker as of its last heartbeat. `job_id` is given only for a job of the caller's own project."""

    id: str
    device_class: str
    host_bytes: int
    gpu_bytes: int
    busy: bool
    job_id: str | None
    started_at: datetime
    heartbeat_at: datetime


class WorkerList(BaseModel):
    """All workers that gave a heartbeat lately."""

    items: list[WorkerRead]


class QueueRead(BaseModel):
    """Jobs of all projects for one device class, and the workers that take them.

    Jobs for `any` go to both kinds of workers: their queue's workers are all.
    """

    device_class: DeviceClass
    queued: int
    running: int
    oldest_queued_at: datetime | None = Field(description="When the first of those that wait was submitted.")
    workers: int
    idle_workers: int


class QueueList(BaseModel):
    """The queues: any, cpu and cuda."""

    items: list[QueueRead]
