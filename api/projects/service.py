"""Projects and their keys: authentication, what may be done with keys, and the first key of an installation.
Functions work in the caller's transaction."""

from __future__ import annotations

import json
from datetime import timedelta

import structlog
from sqlalchemy.orm import Session

from api import database
from api.cursors import Position, next_cursor
from api.errors import Conflict, NotFound, Unauthorized, Unprocessable
from api.listening import url_of
from api.projects import repository
from api.projects.limits import Limits
from api.projects.models import ApiKey, Project
from api.projects.prefixes import S3Access, overlap
from api.projects.principal import Principal
from api.projects.schemas import (
    KeyCreate,
    KeyCreated,
    KeyPage,
    KeyRead,
    LimitsRead,
    ProjectCreate,
    ProjectRead,
    ProjectUpdate,
    ProjectUse,
)
from api.security import KeyHasher, Scope, is_well_formed, new_key, write_private
from api.settings import Settings
from compression.errors import Problem

FIRST_PROJECT = "default"
FIRST_KEY = KeyCreate(name="first key", scopes=[Scope.ADMIN])
NOTED_FOR = timedelta(hours=1)
"""How late last_used_at may be: a write an hour for a key, not one a request."""

log = structlog.get_logger(__name__)


def authenticate(session: Session, hasher: KeyHasher, settings: Settings, key: str | None) -> Principal:
    """The caller with that key.

    Raises:
        Unauthorized: `missing_key`, or `wrong_key` for one that is mistyped, unknown, expired or revoked.
    """
    challenge = {"WWW-Authenticate": "Bearer"}
    if key is None:
        hint = "Send the header `Authorization: Bearer <key>`."
        raise Unauthorized("missing_key", "This call needs an API key.", hint, headers=challenge)
    found = repository.find_key(session, hasher.digest(key)) if is_well_formed(key) else None
    if found is None:
        hint = "Check that the whole key was copied; the server's first one is in its credentials.json."
        raise Unauthorized("wrong_key", "This API key is not known.", hint, headers=challenge)
    noted = found.last_used_at
    return Principal(
        project_id=found.project_id,
        key_id=found.id,
        scopes=frozenset(Scope(scope) for scope in found.scopes),
        limits=Limits.of(found, settings),
        use_is_noted=noted is not None and found.now - noted < NOTED_FOR,
    )


def create_project(session: Session, hasher: KeyHasher, asked: ProjectCreate) -> tuple[Project, KeyCreated]:
    """Make a project and its first key, for everything.

    Raises:
        Conflict: `project_exists`.
    """
    if repository.find_project(session, asked.name) is not None:
        message = f"There is a project {asked.name!r} already."
        raise Conflict("project_exists", message, "Take another name, or make a key for that project.")
    project = repository.add_project(session, asked.name)
    return project, create_key(session, hasher, project.id, FIRST_KEY)


def update(session: Session, name: str, changes: ProjectUpdate) -> Project:
    """Set limits and prefixes of the project of that name.

    Raises:
        NotFound: `project_not_found`.
        Conflict: `prefix_taken`: two projects would write to the same place.
    """
    database.lock(session, "output prefixes")
    project = find_project(session, name)
    taken = repository.others_output_prefixes(session, project.id)
    for prefix in changes.output_prefixes or ():
        if any(overlap(prefix, other) for other in taken):
            message = f"Another project writes to {prefix!r}, or to a part of it."
            raise Conflict("prefix_taken", message, "Give each project a folder of its own.")
    for field, value in changes.model_dump(exclude_unset=True).items():
        setattr(project, field, value)
    session.flush()
    return project


def describe(project: Project, settings: Settings, use: ProjectUse) -> ProjectRead:
    """A project with its limits. use: what of them is used, as `quotas.use` counts it."""
    return ProjectRead(
        id=project.id,
        name=project.name,
        created_at=project.created_at,
        limits=LimitsRead.model_validate(Limits.of(project, settings)),
        s3_prefixes=list(read_prefixes(project, settings)),
        output_prefixes=project.output_prefixes or [],
        use=use,
    )


def s3_access(session: Session, project_id: str, settings: Settings) -> S3Access:
    """Where in S3 the project may read and write."""
    project = repository.get_project(session, project_id)
    return S3Access(
        store_url=settings.store_url,
        reads=read_prefixes(project, settings),
        writes=tuple(project.output_prefixes or ()),
        others=tuple(repository.others_output_prefixes(session, project_id)),
    )


def read_prefixes(project: Project, settings: Settings) -> tuple[str, ...]:
    """Where in S3 the project may name models and text: its own prefixes, else the settings'."""
    own = project.s3_prefixes
    return settings.s3_prefixes if own is None else tuple(own)


def find_project(session: Session, name: str) -> Project:
    """The project of that name.

    Raises:
        NotFound: `project_not_found`.
    """
    project = repository.find_project(session, name)
    if project is None:
        hint = "`bitmill project list` has them."
        raise NotFound("project_not_found", f"There is no project {name!r}.", hint)
    return project


def create_key(session: Session, hasher: KeyHasher, project_id: str, asked: KeyCreate) -> KeyCreated:
    """Make a key for a project. The key itself is in the answer and nowhere else.

    Raises:
        Unprocessable: `already_expired`.
    """
    if asked.expires_at is not None and asked.expires_at <= database.now(session):
        hint = "Give a later one, or none."
        raise Unprocessable(Problem("already_expired", "This time is past.", hint, "/expires_at"))
    key = new_key()
    digest, scopes = hasher.digest(key), sorted(set(asked.scopes))
    row = repository.add_key(session, project_id, asked.name, digest, scopes, asked.expires_at)
    return KeyCreated(**KeyRead.model_validate(row).model_dump(), key=key)


def list_keys(session: Session, project_id: str, cursor: str | None, limit: int) -> KeyPage:
    """A page of keys.

    Raises:
        Unprocessable: `bad_cursor`.
    """
    after = None if cursor is None else Position.of_cursor(cursor)
    keys = repository.list_keys(session, project_id, after, limit + 1)
    items = [KeyRead.model_validate(key) for key in keys[:limit]]
    return KeyPage(items=items, next_cursor=next_cursor(keys, limit))


def revoke_own_key(session: Session, project_id: str, key_id: str) -> None:
    """Revoke a key of the project. Revoking it twice is no error.

    Raises:
        NotFound: `key_not_found`, also for another project's.
        Conflict: `last_admin_key`: without it nobody could make another.
    """
    repository.hold_project(session, project_id)  # of two that revoke each other's key, one comes too late
    key = repository.get_key(session, key_id)
    if key is None or key.project_id != project_id:
        raise _key_not_found(key_id)
    admins = [good.id for good in repository.good_keys(session, project_id) if Scope.ADMIN in good.scopes]
    if admins == [key_id]:
        message = "This is the project's last key with the scope 'admin'."
        raise Conflict("last_admin_key", message, "Make another one first.")
    _revoke(session, key)


def revoke_key(session: Session, key_id: str) -> KeyRead:
    """Revoke any key, for the operator, who can always make another.

    Raises:
        NotFound: `key_not_found`.
    """
    key = repository.get_key(session, key_id)
    if key is None:
        raise _key_not_found(key_id)
    _revoke(session, key)
    return KeyRead.model_validate(key)


def ensure_first_key(session: Session, hasher: KeyHasher, settings: Settings) -> None:
    """Make the first key of a database that has none, and write it to credentials.json.

    The file comes before the commit: a crash in between leaves a database without keys, and the next start
    makes another one.
    """
    database.lock(session, "first key")
    if repository.has_keys(session):
        return
    project = repository.get_or_create_project(session, FIRST_PROJECT)
    key = create_key(session, hasher, project.id, FIRST_KEY).key
    credentials = {"url": url_of(settings.host, settings.port), "api_key": key}
    write_private(settings.credentials_file, (json.dumps(credentials, indent=2) + "\n").encode())
    log.info("first_key_made", file=str(settings.credentials_file))


def _revoke(session: Session, key: ApiKey) -> None:
    if key.revoked_at is None:
        key.revoked_at = database.now(session)
        session.flush()


def _key_not_found(key_id: str) -> NotFound:
    return NotFound("key_not_found", f"There is no key {key_id!r}.")
