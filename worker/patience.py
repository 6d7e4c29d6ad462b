"""Waiting for a store that is away for a while: an upload goes on behind the files that are there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import structlog

from api.artifacts.store import Check, StoreUnreachable

PATIENCE_SECONDS = 300.0
"""How long a file waits for the store. Then the job goes back to the queue, for a worker that reaches it."""
_PAUSE_SECONDS = 0.5
_PAUSE_MAX_SECONDS = 30.0
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
        again = time.monotonic() + pause
        while time.monotonic() < again:
            check()
            time.sleep(_TICK_SECONDS)
        pause = min(2 * pause, _PAUSE_MAX_SECONDS)
