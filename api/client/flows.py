"""What a call does, written once for both clients: a generator that itself sends nothing and never waits.

    flow ── Send, Open, Read, Do, Pause ──▶ driver (drivers.py): blocks, or awaits
         ◀── what came of the step ──────

A flow yields steps and is given what came of each, or has it raised where it yielded. A listing also yields
items, which the driver hands to the caller.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

import httpx

from api.client.errors import error_of

_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 10.0
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """A request to the server. params: those that are None are left out.

    repeatable: sent twice it does what it does once. waits: seconds that the server may take on purpose.
    """

    method: str
    path: str
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    json: Any = None
    content: bytes | None = None
    repeatable: bool = False
    waits: float = 0


@dataclass(frozen=True)
class Send:
    """Gives the response, with its body."""

    request: Request


@dataclass(frozen=True)
class Open:
    """Gives the response, whose body is read by `Read` unless it is an error. Redirects are followed."""

    request: Request


@dataclass(frozen=True)
class Read:
    """Gives the next bytes of what was opened last, None behind the last."""


@dataclass(frozen=True)
class Do:
    """Gives what the function returns, which may take its time with a file."""

    work: Callable[[], Any]


@dataclass(frozen=True)
class Pause:
    """Gives None, later."""

    seconds: float


@dataclass(frozen=True)
class Item(Generic[T]):
    """Hands a value to the caller of a listing, and gives None when it asks for the next."""

    value: T


Step: TypeAlias = Send | Open | Read | Do | Pause
Flow: TypeAlias = Generator[Step, Any, T]
Listing: TypeAlias = Generator[Step | Item[T], Any, None]


class Backoff:
    """The pauses between the tries of a call: exponential, with jitter, and so many seconds in all."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.reset()

    def reset(self) -> None:
        """Start over, because something arrived."""
        self._left = self._seconds
        self._next = _FIRST_PAUSE_SECONDS

    def next_pause(self, retry_after: float | None = None) -> float | None:
        """The seconds until the next try: those that the server asked for, else twice the last ones, with
        jitter. None: there is no next try."""
        seconds = random.uniform(0.5, 1) * self._next if retry_after is None else retry_after
        self._next = min(2 * self._next, _LONGEST_PAUSE_SECONDS)
        if seconds > self._left:
            return None
        self._left -= seconds
        return seconds


def answered(step: Send | Open, backoff: Backoff) -> Flow[httpx.Response]:
    """The answer, with retries: after a connection that failed or broke, and when the server says so
    (Retry-After of a 429 or 503). A request that is not repeatable is sent again only if it cannot have been
    received.

    Raises:
        ApiError: the server's error.
        httpx.TransportError: no answer.
    """
    repeatable = step.request.repeatable
    while True:
        pause: float | None = None
        try:
            response: httpx.Response = yield step
        except httpx.TransportError as error:
            if repeatable or isinstance(error, _NOT_SENT):
                pause = backoff.next_pause()
            if pause is None:
                raise
        else:
            if not response.is_error:
                return response
            retry_after = response.headers.get("Retry-After", "")
            again = response.status_code == 429 or (response.status_code == 503 and repeatable)
            if again and retry_after.isdecimal():
                pause = backoff.next_pause(float(retry_after))
            if pause is None:
                raise error_of(response)
        yield Pause(pause)
