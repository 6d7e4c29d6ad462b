"""What every worker does beside its jobs, in threads: end what was abandoned, wake who sleeps, tell
webhooks, clean up.

Several workers doing the same at once is harmless.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from api.artifacts.store import Store
from api.database import Database
from api.jobs import leases, retention
from api.wake import wake_all
from api.webhooks import outbox
from api.workers import repository as workers
from worker.context import WorkerContext
from worker.deliveries import POLL_SECONDS, Sender
from worker.heartbeat import Periodic, Presence

RETENTION_SECONDS = 3600.0
_DELETED_AT_ONCE = 100
"""Deleted jobs that are removed in one round, so that others get their turn."""

log = structlog.get_logger(__name__)


@contextmanager
def housekeeping(worker: WorkerContext, presence: Presence) -> Iterator[None]:
    """Run the threads while the block runs, and show this worker in the list of workers."""
    settings = worker.settings
    presence.tell()
    sender = Sender(worker.database, settings)
    reaper = Reaper(worker)
    threads = (
        Periodic("presence", settings.heartbeat_seconds, presence.tell),
        Periodic("reaper", min(settings.sweep_seconds, settings.heartbeat_seconds), reaper.reap),
        Periodic("sweep", settings.sweep_seconds, lambda: sweep(worker)),
        Periodic("webhooks", POLL_SECONDS, sender.send_due),
        Periodic("deleted", settings.sweep_seconds, lambda: remove_deleted(worker.database, worker.store)),
        Periodic("retention", RETENTION_SECONDS, lambda: forget_old(worker)),
    )
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.stop()
        sender.close()
        presence.leave()


class Reaper:
    """Ends leases and waits that ran out, and forgets workers that fell silent.

    A lease also runs out when the database is away. So none is ended before the database has answered here
    for the length of a lease, in which every worker that lives has renewed its own. To be called once a
    heartbeat or more often: what is away for less costs no lease.
    """

    def __init__(self, worker: WorkerContext) -> None:
        self._database = worker.database
        self._lease_seconds = worker.settings.lease_seconds
        self._answering_since: float | None = None

    def reap(self) -> None:
        """Do it once."""
        now = time.monotonic()
        since = now if self._answering_since is None else self._answering_since
        self._answering_since = None
        with self._database.write() as session:
            changed = leases.expire(session)
            if now - since > self._lease_seconds:
                changed += leases.reap(session)
                workers.remove_silent(session, self._lease_seconds)
        self._answering_since = since
        if changed:
            log.warning("jobs_reaped", count=changed)


def sweep(worker: WorkerContext) -> None:
    """Repeat wake-ups that may have been lost: no more than there are jobs and idle workers for them."""
    with worker.database.read() as session:
        queued = leases.queued_by_device(session, max_running=worker.settings.max_running)
        alive = workers.list_alive(session, worker.settings.lease_seconds)
    idle = Counter(row.device_class for row, _ in alive if row.job_id is None)
    wake_all(wake_ups(queued, idle), broker_url=worker.settings.broker_url)


def wake_ups(queued: dict[str, int], idle: Counter[str]) -> dict[str, int]:
    """How many wake-ups each queue gets: at most one for each waiting job and each idle worker.

    queued: waiting jobs by device class, `any` among them. idle: idle workers by device class.
    """
    sent = {device_class: min(queued.get(device_class, 0), count) for device_class, count in idle.items()}
    left = idle.total() - sum(sent.values())
    return {**sent, "any": min(queued.get("any", 0), left)}


def forget_old(worker: WorkerContext) -> None:
    """Remove what is kept for some days only, once they are over."""
    with worker.database.write() as session:
        outbox.forget(session, worker.settings.webhook_delivery_days)
    forget_work(worker.database, worker.store, worker.settings.resume_days)


def forget_work(database: Database, store: Store, resume_days: float) -> None:
    """Remove what jobs keep for a resume, and what a killed upload left, once they can no longer be resumed.

    Objects go before the rows that name them, so a crash in between leaves nothing unnamed; a job that is
    retried meanwhile solves again what it misses.
    """
    with database.read() as session:
        over = retention.past_resume(session, resume_days)
    for job in over:
        store.delete(f"work/{job.id}")
        if job.manifest_key is None:
            store.delete(f"artifacts/{job.id}")
        with database.write() as session:
            retention.forget_layers(session, job.id)


def remove_deleted(database: Database, store: Store) -> None:
    """Remove the files of deleted jobs, then their rows: after a crash in between the rest is found again."""
    with database.read() as session:
        job_ids = retention.deleted(session, _DELETED_AT_ONCE)
    for job_id in job_ids:
        for folder in ("work", "artifacts"):
            store.delete(f"{folder}/{job_id}")
        with database.write() as session:
            retention.remove(session, job_id)
