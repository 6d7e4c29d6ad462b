"""What every worker does beside its jobs, in threads: end what was abandoned, wake who sleeps, tell
webhooks, clean up.

Several workers doing the same at once is harmless.
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
from api.jobs.queue import leases, retention, workers
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
_AT_ONCE = 100
"""Deleted jobs that are removed in one round, so that others get their turn."""
_ROWS_AT_ONCE = 500
"""Rows that one transaction removes, so that on SQLite others get to write."""

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
        with self._database.read() as session:  # a look takes no lock of SQLite
            is_over = leases.is_over(session)
            has_silent = workers.has_silent(session, self._lease_seconds)
        knows_silence = now - since > self._lease_seconds
        if is_over:
            self._end(leases.expire)
        if is_over and knows_silence:
            self._end(leases.reap)
        if has_silent and knows_silence:
            with self._database.write() as session:
                workers.remove_silent(session, self._lease_seconds)
        self._answering_since = since

    def _end(self, what: Callable[[Session], int]) -> None:
        """End some in a transaction, until fewer than that are left."""
        changed = leases.REAPED_AT_ONCE
        while changed == leases.REAPED_AT_ONCE:
            with self._database.write() as session:
                changed = what(session)
            if changed:
                log.warning("jobs_reaped", count=changed)


def sweep(worker: WorkerContext) -> None:
    """Repeat wake-ups that may have been lost: no more than there are jobs and idle workers for them."""
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


def forget_old(worker: WorkerContext) -> None:
    """Remove what is kept for some days only, once they are over."""
    days = worker.settings.webhook_delivery_days
    _in_parts(worker.database, lambda session: outbox.forget(session, days, _ROWS_AT_ONCE))
    _in_parts(worker.database, lambda session: jobs.forget_old_idempotency_keys(session, _ROWS_AT_ONCE))
    _in_parts(worker.database, lambda session: digests.forget_old(session, _ROWS_AT_ONCE))
    forget_work(worker.database, worker.store, worker.settings.resume_days)


def _in_parts(database: Database, remove: Callable[[Session], int]) -> None:
    """Remove rows, _ROWS_AT_ONCE in a transaction, until there are fewer."""
    removed = _ROWS_AT_ONCE
    while removed == _ROWS_AT_ONCE:
        with database.write() as session:
            removed = remove(session)


def forget_work(database: Database, store: Store, resume_days: float) -> None:
    """Remove what jobs keep for a resume, and what attempts left that were killed in their upload or fenced
    out, once they can no longer be resumed.

    Objects go before the rows that name them, so a crash in between leaves nothing unnamed; a job that is
    retried meanwhile solves again what it misses.
    """
    while True:
        with database.read() as session:
            over = retention.past_resume(session, resume_days, _AT_ONCE)
        for job in over:
            store.delete(f"work/{job.id}")
            folder = artifact_folder(job.id)
            for token in upload.tokens(store, folder):
                if artifact_key(job.id, token, upload.MANIFEST) != job.manifest_key:
                    upload.remove(store, folder, token)
            with database.write() as session:
                retention.forget_layers(session, job.id)
        if len(over) < _AT_ONCE:
            return


def remove_deleted(database: Database, store: Store) -> None:
    """Remove the files of deleted jobs, then their rows: after a crash in between the rest is found again."""
    with database.read() as session:
        job_ids = retention.deleted(session, _AT_ONCE)
    for job_id in job_ids:
        for folder in ("work", "artifacts"):
            store.delete(f"{folder}/{job_id}")
        with database.write() as session:
            retention.remove(session, job_id)
