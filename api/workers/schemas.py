"""What the workers route answers."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel


class WorkerRead(BaseModel):
    """A worker as its last heartbeat told. `job_id` is given only for a job of the caller's own project."""

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
