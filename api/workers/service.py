"""Who works, as far as a project may know."""

from __future__ import annotations

from typing import get_args

from sqlalchemy.orm import Session

from api.jobs.ledger import repository as jobs
from api.jobs.ledger.models import ACTIVE, DeviceClass, JobStatus
from api.jobs.queue import workers as repository
from api.workers.schemas import QueueList, QueueRead, WorkerList, WorkerRead


def list_queues(session: Session, *, lease_seconds: float) -> QueueList:
    """How much waits, runs, and could run."""
    depths = {(depth.device_class, depth.status): depth for depth in jobs.queue_depths(session)}
    alive = [worker for worker, _ in repository.list_alive(session, lease_seconds)]

    def queue(device_class: DeviceClass) -> QueueRead:
        waiting = depths.get((device_class, JobStatus.QUEUED))
        running = [depths.get((device_class, status)) for status in ACTIVE]
        able = [worker for worker in alive if device_class in ("any", worker.device_class)]
        return QueueRead(
            device_class=device_class,
            queued=waiting.jobs if waiting else 0,
            running=sum(depth.jobs for depth in running if depth),
            oldest_queued_at=waiting.oldest if waiting else None,
            workers=len(able),
            idle_workers=sum(worker.job_id is None for worker in able),
        )

    return QueueList(items=[queue(device_class) for device_class in get_args(DeviceClass)])


def list_workers(session: Session, project_id: str, *, lease_seconds: float) -> WorkerList:
    """The workers that could hold a lease; of other projects' jobs only that there is one."""
    return WorkerList(
        items=[
            WorkerRead(
                id=worker.id,
                device_class=worker.device_class,
                host_bytes=worker.host_bytes,
                gpu_bytes=worker.gpu_bytes,
                busy=worker.job_id is not None,
                job_id=worker.job_id if owner == project_id else None,
                started_at=worker.started_at,
                heartbeat_at=worker.heartbeat_at,
            )
            for worker, owner in repository.list_alive(session, lease_seconds)
        ]
    )
