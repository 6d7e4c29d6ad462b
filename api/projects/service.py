"""Keys of projects: who a key belongs to, and the first key of a new installation."""

from __future__ import annotations

import json

import structlog
from sqlalchemy.orm import Session

from api import database
from api.errors import Unauthorized
from api.projects import repository
from api.security import KeyHasher, Principal, Scope, is_well_formed, new_key, write_private
from api.settings import Settings

FIRST_PROJECT = "default"

log = structlog.get_logger(__name__)


def identify(session: Session, hasher: KeyHasher, key: str | None) -> Principal:
    """Who calls with that key.

    Raises:
        Unauthorized: `missing_key`, or `wrong_key` for one that is mistyped, unknown or revoked.
    """
    challenge = {"WWW-Authenticate": "Bearer"}
    if key is None:
        hint = "Send the header `Authorization: Bearer <key>`."
        raise Unauthorized("missing_key", "This call needs an API key.", hint, headers=challenge)
    found = repository.find_key(session, hasher.digest(key)) if is_well_formed(key) else None
    if found is None:
        hint = "Check that the whole key was copied; the server's first one is in its credentials.json."
        raise Unauthorized("wrong_key", "This API key is not known.", hint, headers=challenge)
    return Principal(found.project_id, found.id, frozenset(Scope(scope) for scope in found.scopes))


def create_key(
    session: Session, hasher: KeyHasher, project_name: str, name: str, scopes: tuple[Scope, ...]
) -> str:
    """Make a key for a project, which is made too if it is new. Returns the key, which is kept nowhere."""
    key = new_key()
    project = repository.get_or_create_project(session, project_name)
    repository.add_key(session, project, name, hasher.digest(key), scopes)
    return key


def ensure_first_key(session: Session, hasher: KeyHasher, settings: Settings) -> None:
    """Make the first key of a database that has none, and write it to credentials.json.

    The file comes before the commit: a crash in between leaves a database without keys, and the next start
    makes another one.
    """
    database.lock(session, "first key")
    if repository.has_keys(session):
        return
    key = create_key(session, hasher, FIRST_PROJECT, "first key", (Scope.ADMIN,))
    credentials = {"url": f"http://{_reachable(settings.host)}:{settings.port}", "api_key": key}
    write_private(settings.credentials_file, (json.dumps(credentials, indent=2) + "\n").encode())
    log.info("first_key_made", file=str(settings.credentials_file))


def _reachable(host: str) -> str:
    """An address to connect to, for one to listen on."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
