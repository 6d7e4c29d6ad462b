"""Wake-ups: messages that make a worker look for jobs at once. The database is the queue, so a message may be
lost, doubled or late."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import lru_cache

import structlog
from celery import Celery
from kombu.exceptions import OperationalError

from api.settings import get_settings

LOOK = "bitmill.look"
EXPIRES_SECONDS = 30
_CONNECT_SECONDS = 2
_PAUSE_SECONDS = 2.0
"""How long a broker that did not answer is left alone. Workers find the jobs of that time by themselves."""

_next_try: dict[str, float] = {}  # broker -> time.monotonic()

log = structlog.get_logger(__name__)


def queue_name(device_class: str) -> str:
    """The queue of a device class. A worker listens on that of its own class and on that of `any`."""
    return f"bitmill.{device_class}"


def wake(device_class: str, *, broker_url: str | None = None) -> bool:
    """Ask one worker of that class (`cpu`, `cuda`, `any`) to look; best effort. Returns whether it was sent.

    broker_url: another broker than the settings'. A broker that is down costs seconds, never an error:
    workers also look by themselves.
    """
    url = broker_url or get_settings().broker_url
    if time.monotonic() < _next_try.get(url, 0):
        return False
    try:
        _producer(url).send_task(
            LOOK, queue=queue_name(device_class), expires=EXPIRES_SECONDS, ignore_result=True, retry=False
        )
    except (OperationalError, OSError) as error:
        _next_try[url] = time.monotonic() + _PAUSE_SECONDS
        log.warning("wake_failed", device_class=device_class, error=type(error).__name__)
        return False
    return True


def wake_all(counts: Mapping[str, int], *, broker_url: str) -> None:
    """Send that many wake-ups to each device class. Stops at the first that cannot be sent."""
    all(
        wake(device_class, broker_url=broker_url)
        for device_class, count in counts.items()
        for _ in range(count)
    )


@lru_cache(maxsize=4)
def _producer(broker_url: str) -> Celery:
    app = Celery("bitmill.api", broker=broker_url, set_as_current=False)
    app.conf.update(
        task_serializer="json",
        task_ignore_result=True,
        broker_connection_timeout=_CONNECT_SECONDS,
        broker_transport_options={
            "socket_connect_timeout": _CONNECT_SECONDS,
            "socket_timeout": _CONNECT_SECONDS,
        },
    )
    return app
