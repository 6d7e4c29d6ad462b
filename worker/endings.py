"""Why an attempt did not succeed, and what is written of it."""

from __future__ import annotations

from typing import Any

import structlog
from sqlalchemy.orm import Session

from api.artifacts.store import StoreUnavailable
from api.jobs import leases
from api.jobs.leases import AttemptFacts, Lease
from api.jobs.models import AttemptOutcome
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


def end(session: Session, lease: Lease, reason: Exception, facts: AttemptFacts) -> None:
    """Write why the attempt did not succeed."""
    if isinstance(reason, CancelRequested):
        leases.mark_cancelled(session, lease, facts)
    elif isinstance(reason, ShuttingDown):
        leases.release(session, lease, facts)
    elif isinstance(reason, StoreUnavailable):
        leases.lose_store(session, lease, reason.code, str(reason), facts)
    else:
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


def _failure(error: Exception) -> AttemptFailed:
    """What a job is told. An error that nobody foresaw is the worker's, so another attempt is worth it."""
    if isinstance(error, AttemptFailed):
        return error
    if isinstance(error, CompressionError) or is_disk_full(error):
        told = explain(error)
        return AttemptFailed(AttemptOutcome.FAILED, told["code"], f"{told['message']} {told['hint']}".strip())
    log.exception("worker_error")
    return AttemptFailed(
        AttemptOutcome.CRASHED, "worker_error", f"{type(error).__name__}: {error}", retryable=True
    )
