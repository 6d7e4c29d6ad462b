"""When this worker's host is to blame: its scratch folder cannot be used, its processes do not start.

No job is the worse for it: the attempt is not counted, and the worker leaves the queue alone for a while.
Otherwise one broken worker, which fails faster than others work, would take every job.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from compression.boundary import is_disk_full

_REST_SECONDS = 60.0
_REST_MAX_SECONDS = 900.0

log = structlog.get_logger(__name__)


class HostFault(Exception):
    """This host cannot run attempts now, whichever job they are of. Code: `host_failed`."""

    code = "host_failed"

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}. The job is not to blame; look at the worker and its host.")


@contextmanager
def needed_of_host(what: str) -> Iterator[None]:
    """Raise an error of the system as HostFault, but not that of a full disk: jobs fill disks, and theirs is
    the code `disk_full`. For what is done before anything depends on the job."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise
        raise HostFault(f"{what}: {error}") from error


class Rest:
    """How long a worker claims no job after faults of its host: a minute, twice as long each time in a row,
    up to 15 minutes."""

    def __init__(self) -> None:
        self._faults = 0
        self._until = float("-inf")

    def is_over(self) -> bool:
        """Whether a job may be claimed."""
        return time.monotonic() >= self._until

    def note(self, *, host_is_fit: bool) -> None:
        """Take notice of how an attempt left the host."""
        if host_is_fit:
            self._faults = 0
            return
        seconds = min(_REST_MAX_SECONDS, _REST_SECONDS * 2.0**self._faults)
        self._faults += 1
        self._until = time.monotonic() + seconds
        log.error("worker_rests", seconds=seconds, hint="Its host is at fault; see the attempt before.")
