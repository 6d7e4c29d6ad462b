"""Retries while a store or a database is away: work goes on where it stood."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import structlog
from sqlalchemy.orm import Session

from api.database import AWAY, Database, reason
from api.store.base import Check, StoreUnreachable

STORE_RETRY_SECONDS = 300.0
"""How long a call to the store is retried. Then the job goes back to the queue, for another worker."""
_BACKOFF_SECONDS = 0.5
_BACKOFF_MAX_SECONDS = 30.0
_DATABASE_PAUSE_SECONDS = 1.0
_POLL_SECONDS = 0.2
"""How often `check` is called during a pause: a cancel has to take effect within 5 seconds."""

P = ParamSpec("P")
T = TypeVar("T")

log = structlog.get_logger(__name__)


def retry_store(check: Check, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `action` returns, retried with exponential backoff while the store is unreachable.

    check: called during the pauses; what it raises ends the retries.

    Raises:
        StoreUnreachable: it still was after STORE_RETRY_SECONDS.
    """
    deadline = time.monotonic() + STORE_RETRY_SECONDS
    pause = _BACKOFF_SECONDS
    while True:
        try:
            return action(*args, **kwargs)
        except StoreUnreachable as error:
            if time.monotonic() + pause > deadline:
                raise
            log.warning("store_unreachable", reason=error.message, pause_seconds=pause)
        _wait(pause, check)
        pause = min(2 * pause, _BACKOFF_MAX_SECONDS)


def write_with_retry(database: Database, action: Callable[[Session], T], check: Check) -> T:
    """What `action` returns in a transaction of its own, retried for as long as the database is away.

    There is no deadline. A worker without its database has nothing else to do, and the fencing token refuses
    the write if the job is another worker's by then. Where only the answer of a commit was lost, `action`
    runs twice, so it has to be idempotent; at worst an event is repeated.

    check: called during the pauses; what it raises ends the retries.
    """
    is_away = False
    while True:
        try:
            with database.write() as session:
                return action(session)
        except AWAY as error:
            if not is_away:
                log.warning("database_away", error=reason(error))
            is_away = True
        _wait(_DATABASE_PAUSE_SECONDS, check)


def _wait(seconds: float, check: Check) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        check()
        time.sleep(_POLL_SECONDS)
