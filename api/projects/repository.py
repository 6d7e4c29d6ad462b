"""Queries on projects and API keys."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from api import database
from api.projects.models import ApiKey, Project
from api.security import Scope


def find_key(session: Session, digest: str) -> ApiKey | None:
    """The key of that digest, unless it was revoked."""
    return session.scalars(
        select(ApiKey).where(ApiKey.digest == digest, ApiKey.revoked_at.is_(None))
    ).one_or_none()


def has_keys(session: Session) -> bool:
    """Whether any key was ever made."""
    return bool(session.scalar(select(exists(select(ApiKey.id)))))


def get_or_create_project(session: Session, name: str) -> Project:
    """The project of that name."""
    project = session.scalars(select(Project).where(Project.name == name)).one_or_none()
    if project is None:
        project = Project(id=f"proj_{secrets.token_hex(10)}", name=name, created_at=database.now(session))
        session.add(project)
        session.flush()
    return project


def add_key(session: Session, project: Project, name: str, digest: str, scopes: Iterable[Scope]) -> ApiKey:
    """Keep a key's digest."""
    key = ApiKey(
        id=f"key_{secrets.token_hex(10)}",
        project_id=project.id,
        name=name,
        digest=digest,
        scopes=[scope.value for scope in scopes],
        created_at=database.now(session),
    )
    session.add(key)
    session.flush()
    return key
