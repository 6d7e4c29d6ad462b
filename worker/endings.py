"""Why an attempt did not succeed, and what is written of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import structlog
from sqlalchemy.orm import Session

from api.jobs.ledger.models import AttemptOutcome
from api.jobs.queue import leases
from api.jobs.queue.leases import AttemptFacts, Lease
from api.store.base import StoreUnavailable
from compression.errors import CompressionError
from worker.context import ShuttingDown
from worker.heartbeat import CancelRequested
from worker.runner import explain, is_disk_full

log = structlog.get_logger(__name__)


class AttemptFailed(Exception):
    """Why an attempt failed. report: what a job keeps that was compressed and then refused."""

    def __init__(
        self,
        outcome: AttemptOutcome,
        code: str,
        message: str,
        *,
        retryable: bool = False,
        report: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.outcome = outcome
        self.code = code
        self.message = message
        self.retryable = retryable
        self.report = report


class Ending(NamedTuple):
    """How an attempt ended. code: why, where it failed or was given back for a reason."""

    outcome: AttemptOutcome
    code: str | None = None


def end(session: Session, lease: Lease, reason: Exception, facts: AttemptFacts) -> Ending:
    """Write why the attempt did not succeed."""
    if isinstance(reason, CancelRequested):
        leases.mark_cancelled(session, lease, facts)
        return Ending(AttemptOutcome.CANCELLED)
    if isinstance(reason, ShuttingDown):
        leases.release(session, lease, facts)
        return Ending(AttemptOutcome.PREEMPTED)
    if isinstance(reason, StoreUnavailable):
        leases.lose_store(session, lease, reason.code, str(reason), facts)
        return Ending(AttemptOutcome.STORE_LOST, reason.code)
    failure = _failure(reason)
    leases.fail(
        session,
        lease,
        failure.outcome,
        failure.code,
        failure.message,
        retryable=failure.retryable,
        report=failure.report,
        facts=facts,
    )
    return Ending(failure.outcome, failure.code)


def _failure(error: Exception) -> AttemptFailed:
    """What a job is told. An error that nobody foresaw is the worker's, so another attempt is worth it."""
    if isinstance(error, AttemptFailed):
        return error
    if isinstance(error, CompressionError) or is_disk_full(error):
        told = explain(error)
        return AttemptFailed(AttemptOutcome.FAILED, told["code"], f"{told['message']} {told['hint']}".strip())
    log.error("worker_error", exc_info=error)
    return AttemptFailed(
        AttemptOutcome.CRASHED, "worker_error", f"{type(error).__name__}: {error}", retryable=True
    )
