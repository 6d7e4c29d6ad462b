"""What a wake-up starts: claim jobs and run them, one after another, until none is left."""

from __future__ import annotations

from api.jobs import leases
from worker.context import WorkerContext
from worker.heartbeat import Presence
from worker.supervisor import run_attempt


def look(worker: WorkerContext, presence: Presence) -> None:
    """Run every job that this worker can claim. Returns when there is none, or when the worker shall stop."""
    while not worker.stopping.is_set():
        with worker.database.write() as session:
            claimed = leases.claim(
                session,
                worker.identity,
                worker.settings.lease_seconds,
                max_running=worker.settings.max_running,
            )
        if claimed is None:
            return
        lease, job = claimed
        with presence.busy(job.id):
            run_attempt(worker, lease, job)
