"""Table: batches."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from api.database import Base
from api.projects.models import Project


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
