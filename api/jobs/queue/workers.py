"""Workers, a row each, kept fresh by heartbeats: who is alive, on which device, with which job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import BigInteger, String, delete, exists, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from api import database
from api.database import Base
from api.jobs.ledger.models import Job


@dataclass(frozen=True)
class WorkerIdentity:
    """Who asks for work. device_class: `cpu` or `cuda`; host_bytes, gpu_bytes: the memory it offers."""

    id: str
    device_class: str
    host_bytes: int
    gpu_bytes: int


class Worker(Base):
    """A worker as of its last heartbeat."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String(200), primary_key=True)
    device_class: Mapped[str] = mapped_column(String(8))
    host_bytes: Mapped[int] = mapped_column(BigInteger)
    gpu_bytes: Mapped[int] = mapped_column(BigInteger)
    job_id: Mapped[str | None] = mapped_column(String(40))
    started_at: Mapped[datetime]
    heartbeat_at: Mapped[datetime]


def heartbeat(session: Session, worker: WorkerIdentity, job_id: str | None = None) -> None:
    """Store that this worker is alive and which job it runs. The first call registers it."""
    now = database.now(session)
    row = session.get(Worker, worker.id)
    if row is None:
        row = Worker(id=worker.id, started_at=now)
        session.add(row)
    row.device_class = worker.device_class
    row.host_bytes = worker.host_bytes
    row.gpu_bytes = worker.gpu_bytes
    row.job_id = job_id
    row.heartbeat_at = now
    session.flush()


def remove(session: Session, worker_id: str) -> None:
    """Forget a worker that stopped in good order."""
    session.execute(delete(Worker).where(Worker.id == worker_id))


def has_silent(session: Session, seconds: float) -> bool:
    """Whether there are workers whose last heartbeat is older than that."""
    silent = select(Worker.id).where(Worker.heartbeat_at < _cutoff(session, seconds))
    return bool(session.scalar(select(exists(silent))))


def remove_silent(session: Session, seconds: float) -> None:
    """Forget workers whose last heartbeat is older than that."""
    session.execute(delete(Worker).where(Worker.heartbeat_at < _cutoff(session, seconds)))


def list_alive(session: Session, seconds: float) -> Sequence[tuple[Worker, str | None]]:
    """Workers with a heartbeat in the last `seconds`, by name, each with the project whose job it runs."""
    query = (
        select(Worker, Job.project_id)
        .outerjoin(Job, Job.id == Worker.job_id)
        .where(Worker.heartbeat_at >= _cutoff(session, seconds))
        .order_by(Worker.id)
    )
    return [(worker, owner) for worker, owner in session.execute(query)]


def _cutoff(session: Session, seconds: float) -> datetime:
    return database.now(session) - timedelta(seconds=seconds)
