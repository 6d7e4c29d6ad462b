"""Waiting for a store or a database that is away for a while: work goes on where it stood."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import structlog
from sqlalchemy.orm import Session

from api.database import AWAY, Database, reason
from api.store.base import Check, StoreUnreachable

PATIENCE_SECONDS = 300.0
"""How long a file waits for the store. Then the job goes back to the queue, for a worker that reaches it."""
_PAUSE_SECONDS = 0.5
_PAUSE_MAX_SECONDS = 30.0
_DATABASE_PAUSE_SECONDS = 1.0
_TICK_SECONDS = 0.2

P = ParamSpec("P")
T = TypeVar("T")

log = structlog.get_logger(__name__)


def patiently(check: Check, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `action` gives, tried again with growing pauses for as long as the store is unreachable.

    check: called a few times a second meanwhile; whatever it raises ends the wait.

    Raises:
        StoreUnreachable: it still was when patience ended.
    """
    give_up = time.monotonic() + PATIENCE_SECONDS
    pause = _PAUSE_SECONDS
    while True:
        try:
            return action(*args, **kwargs)
        except StoreUnreachable as error:
            if time.monotonic() + pause > give_up:
                raise
            log.warning("store_unreachable", reason=error.message, pause_seconds=pause)
        _wait(pause, check)
        pause = min(2 * pause, _PAUSE_MAX_SECONDS)


def write_patiently(check: Check, database: Database, action: Callable[[Session], T]) -> T:
    """What `action` gives in a transaction of its own, tried again for as long as the database is away.

    There is no end to that: a worker without its database has nothing else to do, and should the job be
    another's by then, the fence says so. Where only the answer was lost, `action` happens twice, so it has to
    be one that may: at worst an event is told again.

    check: called a few times a second meanwhile; whatever it raises ends the wait.
    """
    away = False
    while True:
        try:
            with database.write() as session:
                return action(session)
        except AWAY as error:
            if not away:
                log.warning("database_away", error=reason(error))
            away = True
        _wait(_DATABASE_PAUSE_SECONDS, check)


def _wait(seconds: float, check: Check) -> None:
    again = time.monotonic() + seconds
    while time.monotonic() < again:
        check()
        time.sleep(_TICK_SECONDS)
