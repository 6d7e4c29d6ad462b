"""Tables: projects and API keys."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from api.database import Base


class Project(Base):
    """Owner of jobs; what belongs to one project does not exist for another.

    max_queued, max_running, max_body_bytes, requests_per_minute, s3_prefixes: where null, the setting of that
    name holds. output_prefixes: where its jobs may have their files copied to; no other project reads there.
    """

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    max_queued: Mapped[int | None]
    max_running: Mapped[int | None]
    max_body_bytes: Mapped[int | None]
    requests_per_minute: Mapped[int | None]
    s3_prefixes: Mapped[list[str] | None]
    output_prefixes: Mapped[list[str] | None]
    created_at: Mapped[datetime]


class ApiKey(Base):
    """An API key, of which only the HMAC-SHA256 (hexadecimal) is kept.

    last_used_at: not older than an hour where the key is in use; it is not written at every request.
    """

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey(Project.id, ondelete="CASCADE"), index=True)
    name: Mapped[str] = mapped_column(String(100))
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    scopes: Mapped[list[str]]
    created_at: Mapped[datetime]
    last_used_at: Mapped[datetime | None]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
