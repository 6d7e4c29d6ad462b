"""How many requests a project makes in a minute.

A minute begins with the first request after the last one ended. Several API processes count together where
they share a broker: one round trip to Valkey or Redis (7 or later) for a request of a project with a limit.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import structlog
from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry

from api.errors import TooManyRequests
from api.settings import Settings

MINUTE_SECONDS = 60
_STORE_SECONDS = 0.25
"""How long a request waits for a store that does not answer."""
_PAUSE_SECONDS = 10.0
"""How long such a store is not asked again."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Minute:
    """requests: of the running minute, with the one that asks. seconds: until it ends, at least 1."""

    requests: int
    seconds: int


class Rates(Protocol):
    """Counts requests."""

    def count(self, project_id: str) -> Minute | None:
        """Count one more request. None: the store does not answer."""

    def close(self) -> None:
        """Close connections."""


def open_rates(settings: Settings) -> Rates:
    """Counted in this process where it is the only one, else where the wake-ups go."""
    return LocalRates() if settings.embedded else SharedRates(settings.broker_url)


def admit(rates: Rates, project_id: str, per_minute: int) -> dict[str, str]:
    """The answer's headers for one more request, those of draft-ietf-httpapi-ratelimit-headers.

    A store that does not answer lets it through: serving goes before limiting.

    Raises:
        TooManyRequests: `rate_limited`.
    """
    minute = rates.count(project_id)
    if minute is None:
        return {}
    headers = {
        "RateLimit-Limit": str(per_minute),
        "RateLimit-Remaining": str(max(0, per_minute - minute.requests)),
        "RateLimit-Reset": str(minute.seconds),
    }
    if minute.requests > per_minute:
        message = f"The project may make {per_minute} requests a minute."
        hint = f"Ask again in {minute.seconds} seconds. `wait=30` and event streams need fewer requests."
        headers["Retry-After"] = str(minute.seconds)
        raise TooManyRequests("rate_limited", message, hint, headers=headers)
    return headers


class LocalRates:
    """In the memory of this process. clock: seconds that only grow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._minutes: dict[str, tuple[float, int]] = {}

    def count(self, project_id: str) -> Minute:
        with self._lock:
            now = self._clock()
            ends, requests = self._minutes.get(project_id, (now, 0))
            if now >= ends:
                ends, requests = now + MINUTE_SECONDS, 0
            self._minutes[project_id] = ends, requests + 1
        return Minute(requests + 1, math.ceil(ends - now))

    def close(self) -> None:
        pass


class SharedRates:
    """In Valkey or Redis."""

    def __init__(self, url: str) -> None:
        self._store = Redis.from_url(
            url,
            socket_connect_timeout=_STORE_SECONDS,
            socket_timeout=_STORE_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        self._asked_again_at = 0.0
        self._is_down = False

    def count(self, project_id: str) -> Minute | None:
        if time.monotonic() < self._asked_again_at:
            return None
        key = f"bitmill.requests.{project_id}"
        try:
            with self._store.pipeline(transaction=True) as together:
                together.incr(key)
                together.expire(key, MINUTE_SECONDS, nx=True)
                together.ttl(key)
                requests, _, seconds = together.execute()
        except RedisError as error:
            self._asked_again_at = time.monotonic() + _PAUSE_SECONDS
            if not self._is_down:
                self._is_down = True
                log.warning("requests_not_counted", error=type(error).__name__)
            return None
        self._is_down = False
        return Minute(requests, max(1, seconds))

    def close(self) -> None:
        self._store.close()
