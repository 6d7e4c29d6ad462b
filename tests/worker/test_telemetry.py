"""What a worker tells of its attempts: records that name them, and numbers."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx
import pytest
import structlog
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import REGISTRY
from sqlalchemy.orm import undefer_group

from api.errors import Unavailable
from api.jobs.ledger.models import AttemptOutcome, Job
from api.jobs.queue.leases import Lease
from compression.recipe import Recipe
from tests.integration.service import free_port
from tests.support.logs import Logged
from tests.worker.conftest import Submit
from worker import metrics, telemetry
from worker.context import WorkerContext
from worker.engine import WorkProcess, engine_environment
from worker.heartbeat import Presence
from worker.outcomes import Outcome
from worker.runner import EngineSpec
from worker.tasks import run_jobs


def counter(name: str, labels: Mapping[str, str] | None = None) -> Callable[[], float]:
    """By how much a metric has grown since."""
    before = REGISTRY.get_sample_value(name, dict(labels or {})) or 0
    return lambda: (REGISTRY.get_sample_value(name, dict(labels or {})) or 0) - before


def test_an_attempt_that_succeeds(worker: WorkerContext, submit: Submit, logged: Logged) -> None:
    job_id = submit()
    succeeded = counter("bitmill_worker_attempts_total", {"outcome": "succeeded"})
    layers = counter("bitmill_worker_layers_solved_total")
    uploaded = counter("bitmill_worker_uploaded_bytes_total")
    phases = {
        phase: counter("bitmill_worker_phase_seconds_total", {"phase": phase})
        for phase in ("fetch", "plan", "compress", "verify", "upload")
    }
    started = time.monotonic()
    run_jobs(worker, Presence(worker))
    spent = time.monotonic() - started

    assert (succeeded(), layers()) == (1, 2)
    stored = [*worker.store.list(f"work/{job_id}"), *worker.store.list(f"artifacts/{job_id}")]
    shards = {worker.store.size(key) for key in stored if key.startswith("work/")}
    assert uploaded() > sum(shards) > 0
    assert all(seconds() > 0 for seconds in phases.values())
    assert 0.5 * spent < sum(seconds() for seconds in phases.values()) <= spent
    memory = REGISTRY.get_sample_value("bitmill_worker_engine_peak_memory_bytes", {"memory": "host"})
    assert memory is not None
    assert memory > 100 << 20

    (first,) = logged.records("attempt_started")
    (last,) = logged.records("attempt_ended")
    assert (first["job_id"], first["attempt"]) == (last["job_id"], last["attempt"]) == (job_id, 1)
    assert (last["outcome"], last["code"]) == ("succeeded", None)


def test_what_the_engine_says_is_logged_under_its_job(
    worker: WorkerContext, submit: Submit, logged: Logged, tiny_llama: Path
) -> None:
    model = Path(shutil.copytree(tiny_llama, tiny_llama.parent / "soon gone"))
    job_id = submit(model=str(model))
    shutil.rmtree(model)
    failed = counter("bitmill_worker_attempts_total", {"outcome": "failed"})
    run_jobs(worker, Presence(worker))
    assert failed() == 1
    said = logged.records("engine_output")
    assert any("Traceback" in record["line"] for record in said)
    (last,) = logged.records("attempt_ended")
    assert last["outcome"] == "failed"
    assert last["code"]
    assert {(record["job_id"], record["attempt"]) for record in [*said, last]} == {(job_id, 1)}


SPEAKER = """
import os, sys, time
sys.stderr.write("first\\nha")
sys.stderr.flush()
while not os.path.exists("go"):
    time.sleep(0.01)
sys.stderr.write("lf\\n\\n10%\\r20%\\rdone\\n" + 5000 * "x" + "\\nno end")
"""


def test_lines_are_logged_when_they_are_whole(tmp_path: Path, logged: Logged) -> None:
    spec = EngineSpec(
        source=tmp_path, recipe=Recipe.from_short("W8A8", has_dataset=False), output_dir=tmp_path / "output"
    )
    command = (sys.executable, "-c", SPEAKER)

    def lines() -> list[str]:
        return [record["line"] for record in logged.records("engine_output")]

    with structlog.contextvars.bound_contextvars(job_id="job"):
        engine = WorkProcess("engine", spec, tmp_path, command, engine_environment(tmp_path))
        try:
            give_up = time.monotonic() + 20
            while not lines() and time.monotonic() < give_up:
                engine.relay_log()
                time.sleep(0.01)
            engine.relay_log()
            assert lines() == ["first"]
            (tmp_path / "go").touch()
            assert engine.finish() == 0
        finally:
            engine.kill()
    assert lines() == ["first", "half", "done", 4096 * "x", 904 * "x", "no end"]
    assert {record["job_id"] for record in logged.records("engine_output")} == {"job"}


def test_a_worker_shows_its_metrics_on_a_port_of_its_own(worker: WorkerContext) -> None:
    settings = worker.settings.model_copy(update={"worker_metrics_port": free_port()})
    url = f"http://127.0.0.1:{settings.worker_metrics_port}/metrics"
    with metrics.exposed(settings):
        told = httpx.get(url, trust_env=False).text
        with pytest.raises(Unavailable) as taken, metrics.exposed(settings):
            pass
    assert taken.value.code == "metrics_port_unavailable"
    assert 'bitmill_worker_attempts_total{outcome="crashed"}' in told
    assert 'bitmill_worker_phase_seconds_total{phase="compress"}' in told
    with metrics.exposed(worker.settings):  # no port, no server
        pass


def test_only_an_attempt_that_went_wrong_is_an_error_in_its_trace(
    worker: WorkerContext, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(telemetry, "_tracer", provider.get_tracer("test"))
    job_id = submit()
    with worker.database.read() as session:
        job = session.get_one(Job, job_id, options=[undefer_group("work")])
    for outcome in AttemptOutcome:
        telemetry.AttemptTelemetry(Lease(job_id, 1, 1, "w"), job).end(Outcome(outcome))
    errors = {
        span.attributes["bitmill.outcome"]
        for span in spans.get_finished_spans()
        if span.attributes is not None and span.status.status_code == StatusCode.ERROR
    }
    fine = {"succeeded", "cancelled", "preempted", "deduplicated"}
    assert errors == {outcome.value for outcome in AttemptOutcome} - fine
