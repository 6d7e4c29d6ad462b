"""What routes ask for: the app's context, and who calls, within the limits of its project.

No dependency is a session. FastAPI ends a dependency after it has validated the route's answer, and for that
it may wait for a free thread: a transaction would keep its locks all that time (docs/adr/0033).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated

from fastapi import BackgroundTasks, Depends, Request
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from fastapi.security.utils import get_authorization_scheme_param
from prometheus_client import CollectorRegistry
from sqlalchemy.orm import Session

from api.database import AWAY, Database
from api.errors import Forbidden
from api.http.limits import RequestLimits
from api.http.threads import ThreadLimit
from api.jobs.watch import JobWatch
from api.projects import repository as projects
from api.projects.principal import Principal
from api.projects.rates import Rates, admit
from api.projects.service import authenticate
from api.readiness import Readiness
from api.security import KeyHasher, Scope
from api.settings import Settings
from api.store.base import Store


class KeyUses:
    """Notes when a key was used last, after the answer. Of requests at once with the same key, one does."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._mutex = threading.Lock()
        self._being_noted: set[str] = set()

    def note(self, key_id: str) -> None:
        """Note that the key was used now. Where the database is away, the next request notes it."""
        with self._mutex:
            if key_id in self._being_noted:
                return
            self._being_noted.add(key_id)
        try:
            with suppress(*AWAY), self._database.write() as session:
                projects.note_use(session, key_id)
        finally:
            with self._mutex:
                self._being_noted.discard(key_id)


@dataclass(frozen=True)
class AppContext:
    """What an app was made with; lives in `app.state.context`.

    planning_threads: for routes that plan jobs, which may wait for the Hub or S3. wake_threads: for wake-ups,
    which may wait for the broker. resolver_threads: for routes that look up a host's name.
    """

    settings: Settings
    database: Database
    store: Store
    hasher: KeyHasher
    key_uses: KeyUses
    planning_threads: ThreadLimit
    wake_threads: ThreadLimit
    resolver_threads: ThreadLimit
    watch: JobWatch
    rates: Rates
    readiness: Readiness
    metrics: CollectorRegistry


def _context_of(request: Request) -> AppContext:
    context = request.app.state.context
    assert isinstance(context, AppContext)
    return context


# What does not wait is async: FastAPI would send it through a thread otherwise.
async def _context(request: Request) -> AppContext:
    return _context_of(request)


Context = Annotated[AppContext, Depends(_context)]


class Access:
    """A request that is not authenticated yet.

    A route that is called very often asks for this and calls `caller` in the session that it answers from,
    which saves a thread and a connection. It takes the context from here too, since FastAPI solves every
    dependency for itself. All other routes ask for a `Reader`, `Submitter` or `Admin`.
    """

    def __init__(
        self,
        request: Request,
        background: BackgroundTasks,
        key: str | None,
    ) -> None:
        self.context = _context_of(request)
        self._limits: RequestLimits = request.state.limits
        self._background = background
        self._key = key
        self._caller: Principal | None = None

    def caller(self, session: Session, scope: Scope) -> Principal:
        """The caller, who must have that scope. The key is looked up, and the request counted, once.

        session: of `Database.look`. It is without a connection while the request is counted.

        Raises:
            Unauthorized: `missing_key`, `wrong_key`.
            Forbidden: `scope_missing`.
            TooManyRequests: `rate_limited`.
        """
        if self._caller is None:
            self._caller = self._authenticate(session)
        if not self._caller.may(scope):
            raise Forbidden("scope_missing", f"This API key lacks the scope {scope.value!r}.")
        return self._caller

    def _authenticate(self, session: Session) -> Principal:
        context = self.context
        caller = authenticate(session, context.hasher, context.settings, self._key)
        self._limits.set_max_body_bytes(caller.limits.max_body_bytes)
        if caller.limits.requests_per_minute is not None:
            session.rollback()  # gives the connection back: the store that counts may take its time
            self._limits.headers |= admit(context.rates, caller.project_id, caller.limits.requests_per_minute)
        if not caller.use_is_noted:
            self._background.add_task(context.key_uses.note, caller.key_id)
        return caller


class _WithKey(SecurityBase):
    """FastAPI's HTTPBearer, and its place in the document, in one dependency instead of two."""

    def __init__(self) -> None:
        self.model = HTTPBearer(description="An API key; the first is in <data>/credentials.json.")
        self.scheme_name = "HTTPBearer"

    async def __call__(self, request: Request, background: BackgroundTasks) -> Access:
        scheme, key = get_authorization_scheme_param(request.headers.get("Authorization"))
        return Access(request, background, key if scheme.lower() == "bearer" and key else None)


Accessing = Annotated[Access, Depends(_WithKey())]


def _requires(scope: Scope) -> Callable[..., Principal]:
    def principal(access: Accessing) -> Principal:
        with access.context.database.look() as session:
            return access.caller(session, scope)

    return principal


Reader = Annotated[Principal, Depends(_requires(Scope.READ))]
Submitter = Annotated[Principal, Depends(_requires(Scope.SUBMIT))]
Admin = Annotated[Principal, Depends(_requires(Scope.ADMIN))]
