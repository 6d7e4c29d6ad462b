"""Why an attempt did not succeed, whether another one is worth it, and what is written of it."""

from __future__ import annotations

import errno
from typing import Any, NamedTuple

import structlog
from sqlalchemy.exc import DataError, DBAPIError, SQLAlchemyError, StatementError
from sqlalchemy.orm import Session

from api import database
from api.jobs.ledger.models import AttemptOutcome
from api.jobs.queue import leases
from api.jobs.queue.attempts import AttemptFacts
from api.jobs.queue.leases import Lease
from api.store.base import StoreUnavailable
from compression.boundary import is_disk_full
from compression.errors import CompressionError
from worker.context import ShuttingDown
from worker.heartbeat import CancelRequested
from worker.host import HostFault
from worker.messages import storable
from worker.runner import MESSAGE_CHARACTERS, REPORT_HINT, explain

_TRANSIENT = frozenset({
    errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
    errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENODEV, errno.ENOTCONN,
    errno.ENXIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT, errno.ETXTBSY,
})  # fmt: skip
"""Errors of the system that are about a moment or a host, and not about the job's paths and names."""

_ABOUT_FILES = ("disk_full", "output_not_writable", "engine_error")
"""Codes of an engine that could not write, also because its scratch folder is gone."""

log = structlog.get_logger(__name__)


class AttemptFailed(Exception):
    """Why an attempt failed.

    retryable: whether another attempt may succeed. report: what a job keeps that was compressed and then
    refused.
    """

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


class Outcome(NamedTuple):
    """How an attempt ended. code: why, where it failed or was given back for a reason."""

    outcome: AttemptOutcome
    code: str | None = None


def is_about_values(error: Exception) -> bool:
    """Whether the database, or its driver, cannot hold a value: it never will, however often it is tried."""
    is_from_driver = isinstance(error, DBAPIError)
    return isinstance(error, DataError) or (isinstance(error, StatementError) and not is_from_driver)


def is_about_files(reason: Exception) -> bool:
    """Whether an unusable scratch folder may be what stopped the attempt."""
    if isinstance(reason, AttemptFailed | CompressionError):
        return reason.code in _ABOUT_FILES
    return isinstance(reason, OSError)


def write(session: Session, lease: Lease, reason: Exception, facts: AttemptFacts) -> Outcome:
    """End an attempt that `reason` stopped: its job is cancelled, given back, retried or failed."""
    if isinstance(reason, CancelRequested):
        leases.mark_cancelled(session, lease, facts)
        return Outcome(AttemptOutcome.CANCELLED)
    if isinstance(reason, ShuttingDown):
        leases.release(session, lease, facts)
        return Outcome(AttemptOutcome.PREEMPTED)
    if isinstance(reason, StoreUnavailable):
        return _postpone(session, lease, AttemptOutcome.STORE_LOST, reason, facts)
    if isinstance(reason, HostFault):
        return _postpone(session, lease, AttemptOutcome.HOST_FAILED, reason, facts)
    failure = _failure(reason)
    leases.fail(
        session,
        lease,
        failure.outcome,
        failure.code,
        storable(failure.message),
        retryable=failure.retryable,
        report=failure.report,
        facts=facts,
    )
    return Outcome(failure.outcome, failure.code)


def _postpone(
    session: Session,
    lease: Lease,
    outcome: AttemptOutcome,
    reason: StoreUnavailable | HostFault,
    facts: AttemptFacts,
) -> Outcome:
    leases.postpone(session, lease, outcome, reason.code, storable(str(reason)), facts)
    return Outcome(outcome, reason.code)


def _failure(error: Exception) -> AttemptFailed:
    """What is written of an error. One that nobody foresaw is retried only where it is about this host."""
    if isinstance(error, AttemptFailed):
        return error
    if isinstance(error, CompressionError) or is_disk_full(error):
        explained = explain(error)
        message = f"{explained['message']} {explained['hint']}".strip()
        return AttemptFailed(AttemptOutcome.FAILED, explained["code"], message)
    log.error("worker_error", exc_info=error)
    retryable = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _TRANSIENT)
    said = database.reason(error) if isinstance(error, SQLAlchemyError) else str(error)
    message = f"{type(error).__name__}: {said}"[:MESSAGE_CHARACTERS]
    return AttemptFailed(
        AttemptOutcome.CRASHED, "worker_error", f"{message} {REPORT_HINT}", retryable=retryable
    )
