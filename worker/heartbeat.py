"""Heartbeats: a worker renews the lease of the job that it runs, and its own row in the list of workers."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import structlog
from sqlalchemy.exc import SQLAlchemyError

from api.database import AWAY, Database, reason
from api.jobs.ledger.models import JobStatus
from api.jobs.queue import leases, workers
from api.jobs.queue.leases import Lease, LeaseLost
from worker.context import WorkerContext

POLL_SECONDS = 0.5
"""How late a cancel is noticed. An engine that ignores SIGTERM takes 1.5 s more, and 5 is the limit."""

log = structlog.get_logger(__name__)


class CancelRequested(Exception):
    """Somebody asked for the job's cancellation."""


class LeaseKeeper:
    """Renews a lease in a thread of its own. `check` raises when the work must stop.

    A database that does not answer is no reason to stop: only its answer says that a lease is lost.
    """

    def __init__(
        self, database: Database, lease: Lease, *, lease_seconds: float, heartbeat_seconds: float
    ) -> None:
        self._database = database
        self._lease = lease
        self._lease_seconds = lease_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._renewed = time.monotonic()
        self._lost = False
        self._cancelled = False
        self._done = threading.Event()
        self._thread = threading.Thread(
            target=contextvars.copy_context().run,  # its log records name the job and the attempt too
            args=(self._keep,),
            name=f"lease-{lease.job_id}",
            daemon=True,
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def check(self) -> None:
        """Raise what the last poll found: LeaseLost or CancelRequested. Asks no database."""
        if self._lost:
            raise LeaseLost(self._lease)
        if self._cancelled:
            raise CancelRequested(self._lease.job_id)

    def _keep(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            try:
                self._cancelled = self._poll() == JobStatus.CANCELLING
            except LeaseLost:
                self._lost = True
                return
            except SQLAlchemyError as error:
                log.warning("lease_not_checked", error=type(error).__name__)

    def _poll(self) -> JobStatus:
        now = time.monotonic()
        if now - self._renewed < self._heartbeat_seconds:
            with self._database.read() as session:
                return leases.status_of(session, self._lease)
        with self._database.write() as session:
            status = leases.renew(session, self._lease, self._lease_seconds)
        self._renewed = now
        return status


class Presence:
    """This worker's row in the list of workers: its device, its memory, and the job that it runs."""

    def __init__(self, worker: WorkerContext) -> None:
        self._worker = worker
        self._job_id: str | None = None
        self._refreshing = threading.Lock()

    def refresh(self) -> None:
        """Write the row with the current time. The first call makes it."""
        with self._refreshing, self._worker.database.write() as session:
            workers.heartbeat(session, self._worker.identity, self._job_id)

    @contextmanager
    def busy(self, job_id: str) -> Iterator[None]:
        """Have the row name this job while the block runs."""
        self._show(job_id)
        try:
            yield
        finally:
            self._show(None)

    def _show(self, job_id: str | None) -> None:
        self._job_id = job_id
        try:
            self.refresh()
        except SQLAlchemyError as error:  # the next heartbeat writes it
            log.warning("presence_not_written", error=type(error).__name__)

    def leave(self) -> None:
        """Remove the row."""
        try:
            with self._worker.database.write() as session:
                workers.remove(session, self._worker.identity.id)
        except AWAY as error:  # the reaper removes rows without heartbeats
            log.warning("presence_not_removed", error=reason(error))


class Periodic:
    """Calls `action` every `seconds` in a thread until `stop`. A failed call is logged, no more."""

    def __init__(self, name: str, seconds: float, action: Callable[[], None]) -> None:
        self._name = name
        self._seconds = seconds
        self._action = action
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name=name, daemon=True)

    def start(self) -> None:
        """Make the first call at once."""
        self._thread.start()

    def stop(self) -> None:
        """Wait for a running call, and make no more."""
        self._done.set()
        self._thread.join()

    def _repeat(self) -> None:
        while True:
            try:
                self._action()
            except AWAY as error:  # no traceback every few seconds
                log.warning("database_away", action=self._name, error=reason(error))
            except Exception:
                log.exception("periodic_action_failed", action=self._name)
            if self._done.wait(self._seconds):
                return
