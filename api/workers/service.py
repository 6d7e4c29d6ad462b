"""Who works, as far as a project may know."""

from __future__ import annotations

from sqlalchemy.orm import Session

from api.workers import repository
from api.workers.schemas import WorkerList, WorkerRead


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
