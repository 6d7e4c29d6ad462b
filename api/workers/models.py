"""Table: workers, one row each, kept fresh by heartbeats."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import BigInteger, String
from sqlalchemy.orm import Mapped, mapped_column

from api.database import Base


@dataclass(frozen=True)
class WorkerIdentity:
    """Who asks for work. device_class: `cpu` or `cuda`; host_bytes, gpu_bytes: the memory it offers."""

    id: str
    device_class: str
    host_bytes: int
    gpu_bytes: int


class Worker(Base):
    """A worker as its last heartbeat told."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String(200), primary_key=True)
    device_class: Mapped[str] = mapped_column(String(8))
    host_bytes: Mapped[int] = mapped_column(BigInteger)
    gpu_bytes: Mapped[int] = mapped_column(BigInteger)
    job_id: Mapped[str | None] = mapped_column(String(40))
    started_at: Mapped[datetime]
    heartbeat_at: Mapped[datetime]
