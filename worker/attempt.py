"""One attempt at one claimed job, from its lease to its outcome.

    fetch      take over the layers that earlier attempts finished; download, in a process of its own, what is
               not on this machine; end here if another job has done the same work, or does it now
    plan, compress, verify      the engine, in its own process; every finished layer goes to the store
    upload     the output goes to the store, and to S3 where the job says so; then a row publishes it

worker/supervisor.py runs the processes, worker/recorder.py records what they report, worker/publication.py
publishes. An attempt ends in one of six ways: published, deduplicated, failed, cancelled, given back to the
queue, or fenced out. It is given back where this worker stops, where its store stays away, and where its
host cannot run attempts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import structlog
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from api.jobs.ledger.models import AttemptOutcome, Job
from api.jobs.queue import deduplication, leases
from api.jobs.queue.attempts import AttemptFacts
from api.jobs.queue.leases import Lease, LeaseLost
from compression.boundary import is_disk_full
from compression.data.sources import asks_s3, local
from compression.events import PARTIAL_SUFFIX
from compression.recipe import DatasetSpec
from worker import outcomes
from worker.cache_key import compute_cache_key
from worker.context import ShuttingDown, WorkerContext
from worker.engine import WorkProcess, start_engine, start_fetcher
from worker.heartbeat import LeaseKeeper
from worker.host import HostFault
from worker.outcomes import AttemptFailed, Outcome
from worker.publication import Publisher
from worker.recorder import EngineRecorder
from worker.resume import restore
from worker.retry import write_with_retry
from worker.runner import EngineSpec
from worker.scratch import UNUSABLE
from worker.supervisor import Supervisor
from worker.telemetry import AttemptTelemetry

T = TypeVar("T")

log = structlog.get_logger(__name__)


def run_attempt(worker: WorkerContext, lease: Lease, job: Job) -> Outcome:
    """Do the job's work, write its outcome and return it. An outcome that cannot be written is left to the
    reaper."""
    telemetry = AttemptTelemetry(lease, job)
    with (
        structlog.contextvars.bound_contextvars(job_id=lease.job_id, attempt=lease.attempt),
        telemetry.current(),
    ):
        log.info("attempt_started", scheme=job.scheme, model=job.model)
        outcome = Outcome(AttemptOutcome.LEASE_LOST)
        try:
            with LeaseKeeper(
                worker.database,
                lease,
                lease_seconds=worker.settings.lease_seconds,
                heartbeat_seconds=worker.settings.heartbeat_seconds,
            ) as keeper:
                outcome = _run_to_outcome(worker, lease, job, keeper, telemetry)
        except LeaseLost:
            log.warning("lease_lost")
        except ShuttingDown:
            log.warning("outcome_not_written")
        except SQLAlchemyError:
            log.exception("database_failed")
        telemetry.end(outcome)
        log.info("attempt_ended", outcome=outcome.outcome.value, code=outcome.code)
    return outcome


def _run_to_outcome(
    worker: WorkerContext, lease: Lease, job: Job, keeper: LeaseKeeper, telemetry: AttemptTelemetry
) -> Outcome:
    facts = AttemptFacts()
    try:
        with worker.scratch.attempt(lease.job_id, lease.token) as folder:
            attempt = Attempt(worker, lease, job, keeper, folder, telemetry)
            try:
                return Outcome(attempt.run())
            finally:
                facts = attempt.facts
                telemetry.record_memory(facts)
    except LeaseLost:
        raise
    except Exception as reason:
        if isinstance(reason, SQLAlchemyError) and not outcomes.is_about_values(reason):
            raise
        if outcomes.is_about_files(reason):
            fault = worker.scratch.fault()
            if fault is not None and not is_disk_full(fault):
                reason = HostFault(f"{UNUSABLE}: {fault}")
        write = partial(outcomes.write, lease=lease, reason=reason, facts=facts)
        return write_with_retry(worker.database, write, worker.check)


class StopCheck:
    """Raises the reason why an attempt must stop now, if there is one. Costs nothing."""

    def __init__(self, worker: WorkerContext, keeper: LeaseKeeper, max_runtime_seconds: int | None) -> None:
        self._worker = worker
        self._keeper = keeper
        self._limit = max_runtime_seconds
        self._started = time.monotonic()

    def __call__(self) -> None:
        self._keeper.check()
        self._worker.check()
        if self._limit is not None and time.monotonic() - self._started > self._limit:
            raise AttemptFailed(
                AttemptOutcome.TIMED_OUT,
                "max_runtime_seconds",
                f"The job did not end within its max_runtime_seconds of {self._limit}. "
                "Retry it to go on from the last finished layer, or submit it with a higher limit.",
            )


class Attempt:
    """The steps of one attempt, in their order."""

    def __init__(
        self,
        worker: WorkerContext,
        lease: Lease,
        job: Job,
        keeper: LeaseKeeper,
        folder: Path,
        telemetry: AttemptTelemetry,
    ) -> None:
        self._worker = worker
        self._lease = lease
        self._job = job
        self._folder = folder
        self._output = folder / "output"
        self._telemetry = telemetry
        self._check = StopCheck(worker, keeper, job.max_runtime_seconds)
        self._spec = _specification(worker, job, self._output)
        self._recorder = EngineRecorder(worker.database, worker.store, lease, self._output)
        self._supervisor = Supervisor(
            self._recorder, telemetry, self._check, worker.settings.engine_memory_bytes
        )
        self._publisher = Publisher(worker, lease, job, self._check)

    @property
    def facts(self) -> AttemptFacts:
        """What was seen of the processes so far."""
        return self._supervisor.facts

    def run(self) -> AttemptOutcome:
        """Fetch, compress and publish. Returns succeeded or deduplicated; else raises the reason."""
        self._fetch()
        if self._is_duplicate():
            return AttemptOutcome.DEDUPLICATED
        report = self._run_process(start_engine)["report"]
        _hold_to_quality_gate(self._job, report)
        self._enter("upload")
        self._publisher.publish(self._output, self._recorder.shard_digests, report, self.facts)
        return AttemptOutcome.SUCCEEDED

    def _fetch(self) -> None:
        self._enter("fetch")
        self._publisher.probe()
        if self._job.resolved_plan is not None:
            self._restore(self._job.resolved_plan)
        if local(self._spec.source, self._spec.dataset) is None:
            s3 = asks_s3(self._spec.source, self._spec.dataset)
            found = self._run_process(partial(start_fetcher, s3=s3))
            if found["dataset"] is not None:
                self._pin_dataset(found["dataset"])

    def _enter(self, phase: Literal["fetch", "upload"]) -> None:
        """Begin a phase that is the worker's own. The engine reports the others."""
        self._telemetry.enter(phase)
        self._write(lambda session: leases.set_phase(session, self._lease, phase))

    def _restore(self, resolved_plan: dict[str, Any]) -> None:
        """Give the engine what earlier attempts finished. What the store lost, it solves again."""
        job = self._job
        layers = self._write(lambda session: leases.finished_layers(session, job.id, job.work_key or ""))
        partial_folder = self._output.with_name(self._output.name + PARTIAL_SUFFIX)
        lost = restore(self._worker.store, resolved_plan, layers, partial_folder, self._check)
        kept = (row for row in layers if row.layer not in lost)
        self._recorder.shard_digests.update((row.entry["file"], row.sha256) for row in kept)
        if lost:
            warning = {"code": "layers_lost", "message": f"The store lost layers {lost}."}
            self._recorder.record({"type": "warning", "data": warning}, self._check)

    def _pin_dataset(self, dataset: dict[str, Any]) -> None:
        """Have this attempt and later ones read the version of the dataset that the download found."""
        self._write(lambda session: leases.pin_dataset(session, self._lease, dataset))
        self._spec = self._spec.model_copy(update={"dataset": DatasetSpec.model_validate(dataset)})

    def _is_duplicate(self) -> bool:
        """Whether another job has done the same work, or does it now. Then this attempt has ended."""
        cache_key = compute_cache_key(self._worker.database, self._job, self._spec.dataset, self._check)
        self._recorder.cache_key = cache_key

        def take(session: Session) -> bool:
            deduplication.lock_project(session, self._job.project_id)
            leases.save_cache_key(session, self._lease, cache_key.value)
            if cache_key.value is None or not deduplication.may_deduplicate(self._job):
                return False
            return deduplication.end_as_duplicate(session, self._job.id, self._lease.attempt)

        return self._write(take)

    def _run_process(self, start: Callable[[EngineSpec, Path], WorkProcess]) -> dict[str, Any]:
        return self._supervisor.run(start(self._spec, self._folder))

    def _write(self, action: Callable[[Session], T]) -> T:
        return write_with_retry(self._worker.database, action, self._check)


def _specification(worker: WorkerContext, job: Job, output: Path) -> EngineSpec:
    """What the engine is to do. The job may have been stored by another version.

    Raises:
        AttemptFailed: `recipe_not_supported`.
    """
    fields = {
        "source": job.source,
        "recipe": job.recipe,
        "dataset": job.dataset,
        "calibration": job.calibration,
        "evaluation": job.evaluation,
        "device": worker.settings.device,
        "activation_budget_bytes": worker.settings.activation_budget_bytes,
        "output_dir": output,
    }
    try:
        return EngineSpec.model_validate(fields)
    except ValidationError as error:
        wrong = error.errors()[0]
        place = "/".join(map(str, wrong["loc"]))
        raise AttemptFailed(
            AttemptOutcome.FAILED,
            "recipe_not_supported",
            f"This version of the worker does not take {place}: {wrong['msg']}. "
            "Submit the job again, or run a worker of the version that accepted it.",
        ) from error


def _hold_to_quality_gate(job: Job, report: dict[str, Any]) -> None:
    """Raise AttemptFailed, `quality_gate_failed`, where the result is worse than the job allows."""
    if job.quality_gate is None:
        return
    limit = job.quality_gate["max_perplexity_ratio"]
    evaluation = report["evaluation"]
    if evaluation is None:
        found = f"The job allows perplexity to rise by a factor of {limit}, but nothing was evaluated."
    elif evaluation["perplexity_ratio"] > limit:
        found = f"Perplexity rose by a factor of {evaluation['perplexity_ratio']:.4f}; {limit} is allowed."
    else:
        return
    message = f"{found} The report is kept, the checkpoint is not published."
    raise AttemptFailed(AttemptOutcome.FAILED, "quality_gate_failed", message, report=report)
