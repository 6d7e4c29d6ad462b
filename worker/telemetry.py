"""What an attempt tells those who watch: numbers, and spans where they are made."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, StatusCode

from api.jobs.ledger.models import AttemptOutcome, Job
from api.jobs.queue.leases import AttemptFacts, Lease
from api.tracing import context_of
from worker import metrics
from worker.endings import Ending

_tracer = trace.get_tracer("bitmill.worker")
_LAYERS = ("layer_solved", "layer_replayed")


class AttemptTelemetry:
    """Follows one attempt from phase to phase.

    Its span is a child of the request's that queued the job. An item of a batch is a trace of its own, linked
    to the request: a thousand jobs in one trace are more than anybody can look at, or a backend would take.
    """

    def __init__(self, lease: Lease, job: Job) -> None:
        asked = context_of(job.traceparent)
        alone = job.batch_id is not None
        self._span = _tracer.start_span(
            "attempt",
            Context() if alone else asked,
            SpanKind.CONSUMER,
            {
                "bitmill.job_id": lease.job_id,
                "bitmill.attempt": lease.attempt,
                "bitmill.scheme": job.scheme,
                "bitmill.method": job.method,
            },
            [Link(trace.get_current_span(asked).get_span_context())] if alone else None,
        )
        self._inside = trace.set_span_in_context(self._span)
        self._phase: tuple[str, Span, float] | None = None

    @contextmanager
    def current(self) -> Iterator[None]:
        """The block's log records belong to the attempt's trace."""
        with trace.use_span(self._span, record_exception=False, set_status_on_exception=False):
            yield

    def enter(self, phase: str) -> None:
        """Begin a phase, which ends the one before."""
        self._leave()
        self._phase = phase, _tracer.start_span(phase, self._inside), time.monotonic()

    def hear(self, message: dict[str, Any]) -> None:
        """Take notice of what an engine says. When `fetch` begins, the supervisor says."""
        kind, data = message["type"], message["data"]
        if kind == "phase_changed" and data["phase"] != "fetch":
            self.enter(data["phase"])
        elif kind in _LAYERS:
            self._layer(kind, data)

    def saw(self, facts: AttemptFacts) -> None:
        """Take notice of what was seen of the engine's process."""
        for memory, peak in (("host", facts.peak_host_bytes), ("gpu", facts.peak_gpu_bytes)):
            if peak is not None:
                metrics.PEAK_MEMORY.labels(memory).set(peak)

    def end(self, ending: Ending) -> None:
        """The last call."""
        self._leave()
        metrics.ATTEMPTS.labels(ending.outcome.value).inc()
        self._span.set_attribute("bitmill.outcome", ending.outcome.value)
        if ending.code is not None:
            self._span.set_attribute("error.type", ending.code)
        if ending.outcome not in (AttemptOutcome.SUCCEEDED, AttemptOutcome.CANCELLED):
            self._span.set_status(StatusCode.ERROR)
        self._span.end()

    def _leave(self) -> None:
        if self._phase is not None:
            name, span, began = self._phase
            metrics.PHASE_SECONDS.labels(name).inc(time.monotonic() - began)
            span.end()
            self._phase = None

    def _layer(self, kind: str, data: dict[str, Any]) -> None:
        """A span that begins when the engine began with the layer."""
        if kind == "layer_solved":
            metrics.LAYERS.inc()
        now = time.time_ns()
        attributes = {"bitmill.layer": data["layer"]}
        if data.get("relative_error") is not None:
            attributes["bitmill.relative_error"] = data["relative_error"]
        inside = self._inside if self._phase is None else trace.set_span_in_context(self._phase[1])
        began = now - int(1e9 * data["seconds"])
        _tracer.start_span(kind, inside, attributes=attributes, start_time=began).end(now)
