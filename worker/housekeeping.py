"""What every worker does beside its jobs, in threads: reap lost leases, repeat wake-ups, send webhooks,
delete what is past its retention.

Several workers may do the same at once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from sqlalchemy.orm import Session

from api.database import Database
from api.jobs.ledger import repository as jobs
from api.jobs.queue import expiry, leases, retention, workers
from api.jobs.submission import digests
from api.store.base import Store
from api.store.keys import artifact_folder, artifact_key
from api.wake import wake_all
from api.webhooks import outbox
from worker import upload
from worker.context import WorkerContext
from worker.deliveries import POLL_SECONDS, Sender
from worker.heartbeat import Periodic, Presence

RETENTION_SECONDS = 3600.0
_JOBS_AT_ONCE = 100
"""Jobs whose files are removed in one round, so that other threads get their turn."""
_ROWS_AT_ONCE = 500
"""Rows that one transaction removes, so that on SQLite others get to write."""

log = structlog.get_logger(__name__)


@contextmanager
def housekeeping(worker: WorkerContext, presence: Presence) -> Iterator[None]:
    """Run the threads, and list this worker among the workers, while the block runs."""
    settings = worker.settings
    presence.refresh()
    sender = Sender(worker.database, settings)
    reaper = Reaper(worker)
    threads = (
        Periodic("presence", settings.heartbeat_seconds, presence.refresh),
        Periodic("reaper", min(settings.sweep_seconds, settings.heartbeat_seconds), reaper.reap),
        Periodic("sweep", settings.sweep_seconds, lambda: sweep(worker)),
        Periodic("webhooks", POLL_SECONDS, sender.send_due),
        Periodic("deleted", settings.sweep_seconds, lambda: remove_deleted(worker.database, worker.store)),
        Periodic("retention", RETENTION_SECONDS, lambda: delete_expired(worker)),
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
    """Ends leases and queue waits that expired, and removes workers without heartbeats.

    A lease also expires while the database is away, although its worker lives. So leases are reaped only once
    the database has answered for the length of a lease: by then every living worker has renewed its own. Call
    `reap` at least once a heartbeat.
    """

    def __init__(self, worker: WorkerContext) -> None:
        self._database = worker.database
        self._lease_seconds = worker.settings.lease_seconds
        self._answering_since: float | None = None

    def reap(self) -> None:
        """Make one round."""
        now = time.monotonic()
        since = now if self._answering_since is None else self._answering_since
        self._answering_since = None
        with self._database.read() as session:  # reading takes no lock of SQLite
            has_expired = expiry.has_expired(session)
            has_silent = workers.has_silent(session, self._lease_seconds)
        has_answered_long = now - since > self._lease_seconds
        if has_expired:
            self._end(expiry.expire)
        if has_expired and has_answered_long:
            self._end(expiry.reap)
        if has_silent and has_answered_long:
            with self._database.write() as session:
                workers.remove_silent(session, self._lease_seconds)
        self._answering_since = since

    def _end(self, end_some: Callable[[Session], int]) -> None:
        """End REAPED_AT_ONCE in a transaction, until there are fewer."""
        changed = expiry.REAPED_AT_ONCE
        while changed == expiry.REAPED_AT_ONCE:
            with self._database.write() as session:
                changed = end_some(session)
            if changed:
                log.warning("jobs_reaped", count=changed)


def sweep(worker: WorkerContext) -> None:
    """Repeat wake-ups that may have been lost: at most one for each waiting job and idle worker."""
    with worker.database.read() as session:
        alive = workers.list_alive(session, worker.settings.lease_seconds)
        idle = Counter(row.device_class for row, _ in alive if row.job_id is None)
        if not idle:
            return
        queued = leases.queued_by_device(session, max_running=worker.settings.max_running)
    wake_all(wake_ups(queued, idle), broker_url=worker.settings.broker_url)


def wake_ups(queued: dict[str, int], idle: Counter[str]) -> dict[str, int]:
    """How many wake-ups each queue gets: at most one for each waiting job and each idle worker.

    queued: waiting jobs by device class, `any` among them. idle: idle workers by device class.
    """
    sent = {device_class: min(queued.get(device_class, 0), count) for device_class, count in idle.items()}
    left = idle.total() - sum(sent.values())
    return {**sent, "any": min(queued.get("any", 0), left)}


def delete_expired(worker: WorkerContext) -> None:
    """Delete what is past its retention."""
    days = worker.settings.webhook_delivery_days
    _in_parts(worker.database, lambda session: outbox.forget(session, days, _ROWS_AT_ONCE))
    _in_parts(worker.database, lambda session: jobs.forget_old_idempotency_keys(session, _ROWS_AT_ONCE))
    _in_parts(worker.database, lambda session: digests.forget_old(session, _ROWS_AT_ONCE))
    delete_resumable(worker.database, worker.store, worker.settings.resume_days)


def _in_parts(database: Database, remove: Callable[[Session], int]) -> None:
    """Delete rows, _ROWS_AT_ONCE in a transaction, until there are fewer."""
    removed = _ROWS_AT_ONCE
    while removed == _ROWS_AT_ONCE:
        with database.write() as session:
            removed = remove(session)


def delete_resumable(database: Database, store: Store, resume_days: float) -> None:
    """Delete the finished layers of jobs that can no longer be resumed, and uploads of theirs that were not
    published: their attempts were killed or fenced out.

    Objects are deleted before the rows that name them, so a crash in between leaves none without a row. A job
    that is retried meanwhile solves again what is missing.
    """
    while True:
        with database.read() as session:
            over = retention.past_resume(session, resume_days, _JOBS_AT_ONCE)
        for job in over:
            store.delete(f"work/{job.id}")
            folder = artifact_folder(job.id)
            for token in upload.tokens(store, folder):
                if artifact_key(job.id, token, upload.MANIFEST) != job.manifest_key:
                    upload.remove(store, folder, token)
            with database.write() as session:
                retention.forget_layers(session, job.id)
        if len(over) < _JOBS_AT_ONCE:
            return


def remove_deleted(database: Database, store: Store) -> None:
    """Delete the files of deleted jobs, then their rows. After a crash in between the next round goes on."""
    with database.read() as session:
        job_ids = retention.deleted(session, _JOBS_AT_ONCE)
    for job_id in job_ids:
        for folder in ("work", "artifacts"):
            store.delete(f"{folder}/{job_id}")
        with database.write() as session:
            retention.remove(session, job_id)
