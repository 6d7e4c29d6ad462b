"""The work of the Celery task: claim jobs and run them, one after another, until none is left."""

from __future__ import annotations

from contextlib import suppress

from sqlalchemy.orm import Session

from api.jobs.ledger.models import AttemptOutcome, Job
from api.jobs.queue import expiry, leases
from api.jobs.queue.leases import Lease
from worker.attempt import run_attempt
from worker.context import ShuttingDown, WorkerContext
from worker.heartbeat import Presence
from worker.outcomes import Outcome
from worker.retry import write_with_retry


def run_jobs(worker: WorkerContext, presence: Presence) -> None:
    """Run every job that this worker can claim. Returns when there is none, when the worker stops, or when
    its host failed: a later call goes on once the rest is over."""

    def claim(session: Session) -> tuple[Lease, Job] | None:
        expiry.release_held(session, worker.identity.id)
        settings = worker.settings
        return leases.claim(
            session, worker.identity, settings.lease_seconds, max_running=settings.max_running
        )

    with suppress(ShuttingDown):
        while worker.rest.is_over():
            worker.check()
            claimed = write_with_retry(worker.database, claim, worker.check)
            if claimed is None:
                return
            lease, job = claimed
            with presence.busy(job.id):
                outcome = run_attempt(worker, lease, job)
            worker.rest.note(host_is_fit=_is_fit(worker, outcome))


def _is_fit(worker: WorkerContext, outcome: Outcome) -> bool:
    """Whether the next attempt here need not fail like this one: not where the host did, nor where the disk
    is still full after the attempt's files are gone."""
    if outcome.code == "disk_full":
        return worker.scratch.fault() is None
    return outcome.outcome != AttemptOutcome.HOST_FAILED
