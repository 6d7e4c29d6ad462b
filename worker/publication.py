"""Publishing the output of an engine: upload, copies, and the row that makes it the job's result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from api.jobs.ledger.models import Job
from api.jobs.queue import leases
from api.jobs.queue.attempts import AttemptFacts
from api.jobs.queue.leases import CancelWon, Lease, LeaseLost
from api.store.base import Check, StoreError
from api.store.factory import open_store
from api.store.keys import artifact_folder
from worker import outcomes, upload
from worker.context import WorkerContext
from worker.heartbeat import CancelRequested
from worker.retry import retry_store, write_with_retry

log = structlog.get_logger(__name__)


class Publisher:
    """Publishes the result of one attempt, in the artifact store and, where the job says so, in S3.

    check: raises the reason why the attempt must stop.
    """

    def __init__(self, worker: WorkerContext, lease: Lease, job: Job, check: Check) -> None:
        self._worker = worker
        self._lease = lease
        self._check = check
        self._copies = [(open_store(job.output), job.id)] if job.output else []
        self._destinations = [(worker.store, artifact_folder(job.id)), *self._copies]

    def probe(self) -> None:
        """Wait until every destination answers: before hours of work whose result has nowhere to go."""
        for store, _ in self._destinations:
            retry_store(self._check, store.probe)

    def publish(
        self, output: Path, shard_digests: Mapping[str, str], report: dict[str, Any], facts: AttemptFacts
    ) -> None:
        """Upload the output, then write the row that ends the job with it.

        shard_digests: sha256 of the files that are in the store already, by name.

        Raises:
            CancelRequested: a cancel came first.
            LeaseLost: the job is another attempt's.
            DataError, StatementError: the database cannot hold the report.
                In these cases the upload is removed again.
        """
        lease = self._lease
        for store, folder in self._destinations:
            retry_store(self._check, upload.remove_older, store, folder, lease.token)
        try:
            manifest_key = upload.publish(
                self._worker.store, output, lease.job_id, lease.token, shard_digests, self._check
            )
            for store, folder in self._copies:
                upload.copy(store, output, f"{folder}/{lease.token}", self._check)
        except BaseException:
            self._remove_upload()
            raise
        self._end_job(report, manifest_key, facts)

    def _end_job(self, report: dict[str, Any], manifest_key: str, facts: AttemptFacts) -> None:
        def succeed(session: Session) -> None:
            leases.succeed(session, self._lease, report, manifest_key, facts)

        try:
            # Only the worker's end stops this. To the lease keeper, a job that has succeeded is a lost lease.
            write_with_retry(self._worker.database, succeed, self._worker.check)
        except (LeaseLost, SQLAlchemyError) as error:
            if isinstance(error, SQLAlchemyError) and not outcomes.is_about_values(error):
                raise  # the row may have been written
            self._remove_upload()
            if isinstance(error, CancelWon):
                raise CancelRequested(self._lease.job_id) from None
            raise

    def _remove_upload(self) -> None:
        try:
            for store, folder in self._destinations:
                store.probe()  # a store that hangs would keep a cancel waiting
                upload.remove(store, folder, self._lease.token)
        except StoreError as error:  # the next attempt removes it, or whoever deletes the job
            log.warning("upload_not_removed", reason=error.message)
