"""What routes ask for: sessions, the store, the settings, and who calls, within the limits of its project."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated

from fastapi import BackgroundTasks, Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CollectorRegistry
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from api.artifacts.store import Store
from api.database import Database
from api.errors import Forbidden
from api.jobs.watch import JobWatch
from api.limits import RequestLimits
from api.projects import repository as projects
from api.projects.rates import Rates, admit
from api.projects.service import identify
from api.readiness import Readiness
from api.security import KeyHasher, Principal, Scope
from api.settings import Settings


@dataclass(frozen=True)
class AppContext:
    """What an app was made with; lives in `app.state.context`."""

    settings: Settings
    database: Database
    store: Store
    hasher: KeyHasher
    watch: JobWatch
    rates: Rates
    readiness: Readiness
    metrics: CollectorRegistry


def _context(request: Request) -> AppContext:
    context = request.app.state.context
    assert isinstance(context, AppContext)
    return context


def _settings(context: Annotated[AppContext, Depends(_context)]) -> Settings:
    return context.settings


def _store(context: Annotated[AppContext, Depends(_context)]) -> Store:
    return context.store


def _read_session(context: Annotated[AppContext, Depends(_context)]) -> Iterator[Session]:
    with context.database.read() as session:
        yield session


def _write_session(context: Annotated[AppContext, Depends(_context)]) -> Iterator[Session]:
    with context.database.write() as session:
        yield session


Context = Annotated[AppContext, Depends(_context)]
CurrentSettings = Annotated[Settings, Depends(_settings)]
ArtifactStore = Annotated[Store, Depends(_store)]
# scope="function": the transaction ends before the answer is sent, so what was answered is committed.
ReadSession = Annotated[Session, Depends(_read_session, scope="function")]
WriteSession = Annotated[Session, Depends(_write_session, scope="function")]

_bearer = HTTPBearer(auto_error=False, description="An API key; the first is in <data>/credentials.json.")


def _caller(
    request: Request,
    context: Context,
    background: BackgroundTasks,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Principal:
    key = credentials.credentials if credentials else None
    with context.database.read() as session:
        caller = identify(session, context.hasher, context.settings, key)
    limits: RequestLimits = request.state.limits
    limits.lower_body(caller.limits.max_body_bytes)
    if caller.limits.requests_per_minute is not None:
        limits.headers |= admit(context.rates, caller.project_id, caller.limits.requests_per_minute)
    if not caller.use_is_noted:
        background.add_task(_note_use, context.database, caller.key_id)
    return caller


def _note_use(database: Database, key_id: str) -> None:
    with suppress(OperationalError), database.write() as session:  # else the next request notes it
        projects.note_use(session, key_id)


def _requires(scope: Scope) -> Callable[..., Awaitable[Principal]]:
    async def principal(caller: Annotated[Principal, Depends(_caller)]) -> Principal:
        if not caller.may(scope):
            raise Forbidden("scope_missing", f"This API key lacks the scope {scope.value!r}.")
        return caller

    return principal


Reader = Annotated[Principal, Depends(_requires(Scope.READ))]
Submitter = Annotated[Principal, Depends(_requires(Scope.SUBMIT))]
Admin = Annotated[Principal, Depends(_requires(Scope.ADMIN))]
