"""One attempt at one claimed job, from the lease to its end.

    fetch      what earlier attempts finished, from the store; what is elsewhere, by a process of its own;
               which work it is: where another job has done it or does it now, nothing is left to do here
    plan, compress, verify      the engine, in its own process; every finished layer goes to the store
    upload     the output, to where else the job wants it too, then the row that publishes it

An attempt ends in one of six ways: published, deduplicated, failed, cancelled, given back, or fenced out. It
is given back where this worker ends, or its store stays away. A database that is away is waited for; the
engine works on.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from api.jobs.ledger.models import AttemptOutcome, Job, JobLayer
from api.jobs.queue import deduplication, leases
from api.jobs.queue.leases import AttemptFacts, CancelWon, Lease, LeaseLost
from api.store.base import Check, StoreError
from api.store.factory import open_store
from api.store.keys import artifact_folder
from compression.data.sources import asks_s3, local
from compression.events import PARTIAL_SUFFIX
from compression.recipe import DatasetSpec
from worker import endings, upload
from worker.context import ShuttingDown, WorkerContext
from worker.endings import AttemptFailed, Ending
from worker.engine import FETCHER, RUNNER, EngineProcess, engine_environment, fetcher_environment
from worker.heartbeat import CancelRequested, LeaseKeeper
from worker.identity import Identity, identify
from worker.patience import patiently, write_patiently
from worker.resume import restore
from worker.runner import EngineSpec
from worker.telemetry import AttemptTelemetry

_TICK_SECONDS = 0.2
_KEEP_SECONDS = 1.0  # for what a stopped engine had told; a cancel waits for no slow store
_TERMINAL = ("succeeded", "failed")
_WORTH_RETRYING = ("hub_unreachable", "s3_unreachable")

T = TypeVar("T")

log = structlog.get_logger(__name__)


class _TimeIsUp(Exception):
    """What is not kept by now is not worth the wait."""


def run_attempt(worker: WorkerContext, lease: Lease, job: Job) -> None:
    """Do the job's work and write its end. One that the database does not take is left to the reaper."""
    told = AttemptTelemetry(lease, job)
    with structlog.contextvars.bound_contextvars(job_id=lease.job_id, attempt=lease.attempt), told.current():
        log.info("attempt_started", scheme=job.scheme, model=job.model)
        ending = Ending(AttemptOutcome.LEASE_LOST)
        try:
            with LeaseKeeper(
                worker.database,
                lease,
                lease_seconds=worker.settings.lease_seconds,
                heartbeat_seconds=worker.settings.heartbeat_seconds,
            ) as keeper:
                ending = _run_to_an_end(worker, lease, job, keeper, told)
        except LeaseLost:
            log.warning("lease_lost")
        except ShuttingDown:
            log.warning("end_not_written")
        except SQLAlchemyError:
            log.exception("database_failed")
        told.end(ending)
        log.info("attempt_ended", outcome=ending.outcome.value, code=ending.code)


def _run_to_an_end(
    worker: WorkerContext, lease: Lease, job: Job, keeper: LeaseKeeper, told: AttemptTelemetry
) -> Ending:
    facts = AttemptFacts()
    try:
        with worker.scratch.attempt(lease.job_id, lease.token) as folder:
            attempt = _Attempt(worker, lease, job, keeper, folder, told)
            try:
                outcome = attempt.run()
            finally:
                facts = attempt.facts
                told.saw(facts)
    except (LeaseLost, SQLAlchemyError):
        raise
    except Exception as reason:
        end = partial(endings.end, lease=lease, reason=reason, facts=facts)
        return write_patiently(worker.check, worker.database, end)
    return Ending(outcome)


def _specification(worker: WorkerContext, job: Job, output: Path) -> EngineSpec:
    return EngineSpec.model_validate(
        {
            "source": job.source,
            "recipe": job.recipe,
            "dataset": job.dataset,
            "calibration": job.calibration,
            "evaluation": job.evaluation,
            "device": worker.settings.device,
            "activation_budget_bytes": worker.settings.activation_budget_bytes,
            "output_dir": output,
        }
    )


class _Attempt:
    """The work itself. facts: what was seen of the engine so far."""

    def __init__(
        self,
        worker: WorkerContext,
        lease: Lease,
        job: Job,
        keeper: LeaseKeeper,
        folder: Path,
        told: AttemptTelemetry,
    ) -> None:
        self._worker = worker
        self._store = worker.store
        self._copies = [(open_store(job.output), job.id)] if job.output else []
        self._places = [(worker.store, artifact_folder(job.id)), *self._copies]
        self._lease = lease
        self._job = job
        self._keeper = keeper
        self._folder = folder
        self._told = told
        self._output = folder / "output"
        self._partial = folder / f"output{PARTIAL_SUFFIX}"
        self._started = time.monotonic()
        self._spec = _specification(worker, job, self._output)
        self._digests: dict[str, str] = {}  # of finished layers' shards, by file name
        self._identity: Identity | None = None
        self._unkept: dict[str, Any] | None = None  # the message that a stop came in between
        self.facts = AttemptFacts()

    def run(self) -> AttemptOutcome:
        """Fetch, compress and publish. How it ended, when nothing is left to do; else raises the reason."""
        self._told.enter("fetch")
        self._fetch()
        if self._is_done_elsewhere():
            return AttemptOutcome.DEDUPLICATED
        report = self._compress()
        self._hold_to_quality_gate(report)
        self._told.enter("upload")
        self._publish(report)
        return AttemptOutcome.SUCCEEDED

    def _fetch(self) -> None:
        def begin(session: Session) -> list[JobLayer]:
            leases.set_phase(session, self._lease, "fetch")
            return leases.finished_layers(session, self._job.id, self._job.work_key or "")

        layers = self._write(begin, self._check)
        for store, _ in self._places:
            patiently(self._check, store.probe)  # before hours of work whose result has nowhere to go
        if self._job.resolved_plan is not None:
            self._restore(self._job.resolved_plan, layers)
        dataset = self._spec.dataset
        if local(self._spec.source, dataset) is None:
            environment = fetcher_environment(self._folder, s3=asks_s3(self._spec.source, dataset))
            found = self._run(EngineProcess(self._spec, self._folder, FETCHER, environment))
            if found["dataset"] is not None:
                self._pin(found["dataset"])

    def _is_done_elsewhere(self) -> bool:
        """Find out which work the job is. Whether another one has done it, or does it now: then this attempt
        has ended."""
        found = identify(self._worker.database, self._job, self._spec.dataset, self._check)
        self._identity = found

        def take(session: Session) -> bool:
            deduplication.lock_project(session, self._job.project_id)
            leases.save_cache_key(session, self._lease, found.key)
            if found.key is None or not deduplication.may_deduplicate(self._job):
                return False
            return deduplication.end_as_duplicate(session, self._job.id, self._lease.attempt)

        return self._write(take, self._check)

    def _restore(self, resolved_plan: dict[str, Any], layers: Sequence[JobLayer]) -> None:
        lost = restore(self._store, resolved_plan, layers, self._partial, self._check)
        self._digests = {row.entry["file"]: row.sha256 for row in layers if row.layer not in lost}
        if lost:
            warning = {"code": "layers_lost", "message": f"The store lost layers {lost}."}
            self._handle({"type": "warning", "data": warning}, self._check)

    def _pin(self, dataset: dict[str, Any]) -> None:
        """From here on the job is about this state of its dataset, in this attempt and in later ones."""
        self._write(lambda session: leases.pin_dataset(session, self._lease, dataset), self._check)
        self._spec = self._spec.model_copy(update={"dataset": DatasetSpec.model_validate(dataset)})

    def _compress(self) -> dict[str, Any]:
        engine = EngineProcess(self._spec, self._folder, RUNNER, engine_environment(self._folder))
        report: dict[str, Any] = self._run(engine)["report"]
        return report

    def _run(self, engine: EngineProcess) -> dict[str, Any]:
        """See a process through to its end; what it gives."""
        try:
            return self._supervise(engine)
        except (CancelRequested, ShuttingDown, AttemptFailed):
            engine.terminate()
            self._keep_finished(engine)
            raise
        finally:
            engine.kill()

    def _supervise(self, engine: EngineProcess) -> dict[str, Any]:
        """The data of the last message of a process that succeeded."""
        while True:
            self._check_engine(engine)
            try:
                message = self._next_message(engine, _TICK_SECONDS)
            except EOFError:
                raise self._crash(engine) from None
            if message is None:
                continue
            if message["type"] in _TERMINAL:
                engine.finish(self._check)
                return self._result(message)
            self._unkept = message
            self._handle(message, lambda: self._check_engine(engine))
            self._unkept = None

    def _keep_finished(self, engine: EngineProcess) -> None:
        """Record what a stopped engine had told before it stopped, so that no later attempt solves it; as far
        as the store takes it at once."""
        give_up = time.monotonic() + _KEEP_SECONDS

        def check() -> None:
            if time.monotonic() > give_up:
                raise _TimeIsUp

        try:
            if self._unkept is not None:
                self._handle(self._unkept, check)
            while (message := self._next_message(engine, 0)) is not None:
                if message["type"] not in _TERMINAL:
                    self._handle(message, check)
        except (EOFError, _TimeIsUp, StoreError):
            return

    def _next_message(self, engine: EngineProcess, seconds: float) -> dict[str, Any] | None:
        message = engine.next_message(seconds)
        if message is not None:
            self._told.hear(message)
        return message

    def _handle(self, message: dict[str, Any], check: Check) -> None:
        data = message["data"]
        if message["type"] == "layer_solved":
            self._keep_layer(data, check)
            return
        if message["type"] == "phase_changed" and data["phase"] == "fetch":
            return  # the engine finds in the cache what was fetched for it, in the phase of that name

        def tell(session: Session) -> None:
            if message["type"] == "phase_changed":
                leases.set_phase(session, self._lease, data["phase"])
            elif message["type"] == "plan_resolved":
                leases.save_plan(session, self._lease, data["header"])
                if self._identity is not None and not self._identity.holds():
                    leases.save_cache_key(session, self._lease, None)
            else:
                leases.append_event(session, self._lease, message["type"], data)

        self._write(tell, check)

    def _keep_layer(self, data: dict[str, Any], check: Check) -> None:
        """First the shard, durable in the store, then the row that makes the layer finished."""
        name, sha256 = data["entry"]["file"], data["entry"]["sha256"]
        try:
            key = upload.keep_shard(self._store, self._partial / name, self._job.id, sha256, check)
        except FileNotFoundError:  # the engine published meanwhile, by renaming its folder
            key = upload.keep_shard(self._store, self._output / name, self._job.id, sha256, check)
        self._write(lambda session: leases.record_layer(session, self._lease, data, key), check)
        self._digests[name] = sha256

    def _check(self) -> None:
        """Raise the reason why this attempt must stop now, if there is one."""
        self._keeper.check()
        self._worker.check()
        limit = self._job.max_runtime_seconds
        if limit is not None and time.monotonic() - self._started > limit:
            raise AttemptFailed(
                AttemptOutcome.TIMED_OUT,
                "max_runtime_seconds",
                f"The job did not end within its max_runtime_seconds of {limit}. "
                "Retry it to go on from the last finished layer, or submit it with a higher limit.",
            )

    def _check_engine(self, engine: EngineProcess) -> None:
        self._check()
        engine.relay_log()
        resident = engine.resident_bytes()
        self.facts = dataclasses.replace(self.facts, peak_host_bytes=engine.peak_host_bytes)
        limit = self._worker.settings.engine_memory_bytes
        if limit is not None and resident > limit:
            raise AttemptFailed(
                AttemptOutcome.OUT_OF_MEMORY,
                "memory_limit",
                f"The engine used {resident} bytes of memory; this worker allows {limit}. "
                "Use fewer or shorter calibration samples, or a worker with more memory.",
            )

    def _crash(self, engine: EngineProcess) -> AttemptFailed:
        code = engine.finish(self._check)
        log.error("engine_crashed", exit_code=code, log_tail=engine.log_tail())
        if code >= 0:
            how = f"ended with exit code {code} and said nothing"
        else:
            self.facts = dataclasses.replace(self.facts, exit_signal=-code)
            how = f"was killed by {signal.Signals(-code).name}"
            how += " (often the kernel, out of memory)" if -code == signal.SIGKILL else ""
        return AttemptFailed(
            AttemptOutcome.CRASHED, "engine_crashed", f"The engine process {how}.", retryable=True
        )

    def _result(self, message: dict[str, Any]) -> dict[str, Any]:
        data: dict[str, Any] = message["data"]
        self.facts = dataclasses.replace(
            self.facts,
            peak_host_bytes=data["peak_host_bytes"],
            peak_gpu_bytes=data.get("report", {}).get("peak_gpu_bytes"),
        )
        if message["type"] == "succeeded":
            return data
        is_memory = data["code"] == "out_of_memory"
        outcome = AttemptOutcome.OUT_OF_MEMORY if is_memory else AttemptOutcome.FAILED
        message_and_hint = f"{data['message']} {data['hint']}".strip()
        raise AttemptFailed(
            outcome, data["code"], message_and_hint, retryable=data["code"] in _WORTH_RETRYING
        )

    def _hold_to_quality_gate(self, report: dict[str, Any]) -> None:
        if self._job.quality_gate is None:
            return
        limit = self._job.quality_gate["max_perplexity_ratio"]
        evaluation = report["evaluation"]
        if evaluation is None:
            found = f"The job allows perplexity to rise by a factor of {limit}, but nothing was evaluated."
        elif evaluation["perplexity_ratio"] > limit:
            found = (
                f"Perplexity rose by a factor of {evaluation['perplexity_ratio']:.4f}; {limit} is allowed."
            )
        else:
            return
        message = f"{found} The report is kept, the checkpoint is not published."
        raise AttemptFailed(AttemptOutcome.FAILED, "quality_gate_failed", message, report=report)

    def _publish(self, report: dict[str, Any]) -> None:
        """Upload, then the fenced row that makes it the job's result; an upload that is none is removed."""
        self._write(lambda session: leases.set_phase(session, self._lease, "upload"), self._check)
        token = self._lease.token
        for store, folder in self._places:
            patiently(self._check, upload.remove_older, store, folder, token)
        try:
            manifest_key = upload.publish(
                self._store, self._output, self._job.id, token, self._digests, self._check
            )
            for store, folder in self._copies:
                upload.copy(store, self._output, f"{folder}/{token}", self._check)
        except BaseException:
            self._remove_upload()
            raise

        def succeed(session: Session) -> None:
            leases.succeed(session, self._lease, report, manifest_key, self.facts)

        try:
            self._write(succeed, self._worker.check)  # a keeper would take a row that was written for a loss
        except LeaseLost as error:  # all else leaves open whether the row was written
            self._remove_upload()
            if isinstance(error, CancelWon):
                raise CancelRequested(self._job.id) from None
            raise

    def _remove_upload(self) -> None:
        try:
            for store, folder in self._places:
                store.probe()  # one that hangs would keep a cancel waiting
                upload.remove(store, folder, self._lease.token)
        except StoreError as error:  # the next attempt removes it, or whoever deletes the job
            log.warning("upload_not_removed", reason=error.message)

    def _write(self, action: Callable[[Session], T], check: Check) -> T:
        return write_patiently(check, self._worker.database, action)
