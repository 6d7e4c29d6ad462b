"""Queries on projects and API keys."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import ColumnElement, bindparam, exists, or_, select, tuple_, update
from sqlalchemy.orm import Session

from api import database
from api.cursors import Position
from api.projects.models import ApiKey, Project
from api.security import Scope


class FoundKey(NamedTuple):
    """A valid key with its project, as authentication needs them. now: the database's time."""

    id: str
    scopes: list[str]
    last_used_at: datetime | None
    project_id: str
    max_queued: int | None
    max_running: int | None
    max_body_bytes: int | None
    requests_per_minute: int | None
    now: datetime


def find_key(session: Session, digest: str) -> FoundKey | None:
    """The key of that digest, unless it was revoked or has expired."""
    row = session.execute(_FIND_KEY, {"digest": digest}).one_or_none()
    return None if row is None else FoundKey(*row)


def has_keys(session: Session) -> bool:
    """Whether any key was ever made."""
    return bool(session.scalar(select(exists(select(ApiKey.id)))))


def get_project(session: Session, project_id: str) -> Project:
    """The project of that id, which must exist."""
    return session.get_one(Project, project_id)


def find_project(session: Session, name: str) -> Project | None:
    """The project of that name."""
    return session.scalars(select(Project).where(Project.name == name)).one_or_none()


def others_output_prefixes(session: Session, project_id: str) -> list[str]:
    """Where all projects but this one write."""
    found = session.scalars(select(Project.output_prefixes).where(Project.id != project_id))
    return [prefix for prefixes in found for prefix in prefixes or ()]


def list_projects(session: Session) -> Sequence[Project]:
    """All projects, by name."""
    return session.scalars(select(Project).order_by(Project.name)).all()


def add_project(session: Session, name: str) -> Project:
    """Make a project without limits of its own."""
    project = Project(id=f"proj_{secrets.token_hex(10)}", name=name, created_at=database.now(session))
    session.add(project)
    session.flush()
    return project


def get_or_create_project(session: Session, name: str) -> Project:
    """The project of that name."""
    return find_project(session, name) or add_project(session, name)


def hold_project(session: Session, project_id: str) -> None:
    """Lock the project's row until the transaction ends, against others that call this."""
    session.execute(select(Project.id).where(Project.id == project_id).with_for_update(key_share=True))


def add_key(
    session: Session,
    project_id: str,
    name: str,
    digest: str,
    scopes: Iterable[Scope],
    expires_at: datetime | None,
) -> ApiKey:
    """Keep a key's digest."""
    key = ApiKey(
        id=f"key_{secrets.token_hex(10)}",
        project_id=project_id,
        name=name,
        digest=digest,
        scopes=[scope.value for scope in scopes],
        created_at=database.now(session),
        expires_at=expires_at,
    )
    session.add(key)
    session.flush()
    return key


def get_key(session: Session, key_id: str) -> ApiKey | None:
    """The key of that id, of any project and in any state."""
    return session.get(ApiKey, key_id)


def good_keys(session: Session, project_id: str) -> Sequence[ApiKey]:
    """A project's keys that are neither revoked nor expired."""
    return session.scalars(select(ApiKey).where(ApiKey.project_id == project_id, *_is_good())).all()


def list_keys(session: Session, project_id: str, after: Position | None, limit: int) -> Sequence[ApiKey]:
    """At most `limit` keys of a project after a position, in any state, the newest first."""
    place = (ApiKey.created_at, ApiKey.id)
    query = select(ApiKey).where(ApiKey.project_id == project_id).order_by(*(each.desc() for each in place))
    if after is not None:
        query = query.where(tuple_(*place) < (after.created_at, after.id))
    return session.scalars(query.limit(limit)).all()


def note_use(session: Session, key_id: str) -> None:
    """Store that a key was used now."""
    session.execute(update(ApiKey).where(ApiKey.id == key_id).values(last_used_at=database.now(session)))


_KEYS, _PROJECTS = ApiKey.__table__.c, Project.__table__.c


def _is_good() -> tuple[ColumnElement[bool], ...]:
    return (
        _KEYS.revoked_at.is_(None),
        or_(_KEYS.expires_at.is_(None), _KEYS.expires_at > database.Now()),
    )


# Every request makes this query. It is built once and reads columns: building it, and making objects of its
# rows, takes longer than running it.
_FIND_KEY = select(
    *(_KEYS.id, _KEYS.scopes, _KEYS.last_used_at, _KEYS.project_id),
    *(_PROJECTS.max_queued, _PROJECTS.max_running, _PROJECTS.max_body_bytes, _PROJECTS.requests_per_minute),
    database.Now(),
).where(_PROJECTS.id == _KEYS.project_id, _KEYS.digest == bindparam("digest"), *_is_good())
