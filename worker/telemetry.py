"""Metrics and trace spans of an attempt."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, StatusCode

from api.jobs.ledger.models import AttemptOutcome, Job
from api.jobs.queue.attempts import AttemptFacts
from api.jobs.queue.leases import Lease
from api.tracing import context_of
from worker import metrics
from worker.messages import Message
from worker.outcomes import Outcome

_tracer = trace.get_tracer("bitmill.worker")
_LAYERS = ("layer_solved", "layer_replayed")
_NO_ERROR = (
    AttemptOutcome.SUCCEEDED,
    AttemptOutcome.CANCELLED,
    AttemptOutcome.PREEMPTED,
    AttemptOutcome.DEDUPLICATED,
)
"""Ends of attempts that are as they should be."""


class AttemptTelemetry:
    """The span of one attempt, with a child span for each phase.

    The attempt's span is a child of the span of the request that queued the job. An item of a batch starts a
    trace of its own, linked to the request: backends refuse a trace of a thousand jobs.
    """

    def __init__(self, lease: Lease, job: Job) -> None:
        parent = context_of(job.traceparent)
        is_in_batch = job.batch_id is not None
        self._span = _tracer.start_span(
            "attempt",
            Context() if is_in_batch else parent,
            SpanKind.CONSUMER,
            {
                "bitmill.job_id": lease.job_id,
                "bitmill.attempt": lease.attempt,
                "bitmill.scheme": job.scheme,
                "bitmill.method": job.method,
            },
            [Link(trace.get_current_span(parent).get_span_context())] if is_in_batch else None,
        )
        self._inside = trace.set_span_in_context(self._span)
        self._phase: tuple[str, Span, float] | None = None

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make log records of the block part of the attempt's trace."""
        with trace.use_span(self._span, record_exception=False, set_status_on_exception=False):
            yield

    def enter(self, phase: str) -> None:
        """Begin a phase, which ends the one before."""
        self._leave()
        self._phase = phase, _tracer.start_span(phase, self._inside), time.monotonic()

    def on_message(self, message: Message) -> None:
        """Follow a message of a process. The attempt itself calls `enter` for `fetch` and `upload`."""
        kind, data = message["type"], message["data"]
        if kind == "phase_changed" and data["phase"] != "fetch":
            self.enter(data["phase"])
        elif kind in _LAYERS:
            self._layer(kind, data)

    def record_memory(self, facts: AttemptFacts) -> None:
        """Record the peak memory of the attempt's processes."""
        for memory, peak in (("host", facts.peak_host_bytes), ("gpu", facts.peak_gpu_bytes)):
            if peak is not None:
                metrics.PEAK_MEMORY.labels(memory).set(peak)

    def end(self, outcome: Outcome) -> None:
        """End the attempt's span. The last call."""
        self._leave()
        metrics.ATTEMPTS.labels(outcome.outcome.value).inc()
        self._span.set_attribute("bitmill.outcome", outcome.outcome.value)
        if outcome.code is not None:
            self._span.set_attribute("error.type", outcome.code)
        if outcome.outcome not in _NO_ERROR:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()

    def _leave(self) -> None:
        if self._phase is not None:
            name, span, began = self._phase
            metrics.PHASE_SECONDS.labels(name).inc(time.monotonic() - began)
            span.end()
            self._phase = None

    def _layer(self, kind: str, data: dict[str, Any]) -> None:
        """A span of a layer that has just ended."""
        if kind == "layer_solved":
            metrics.LAYERS.inc()
        now = time.time_ns()
        attributes = {"bitmill.layer": data["layer"]}
        if data.get("relative_error") is not None:
            attributes["bitmill.relative_error"] = data["relative_error"]
        parent = self._inside if self._phase is None else trace.set_span_in_context(self._phase[1])
        began = now - int(1e9 * data["seconds"])
        _tracer.start_span(kind, parent, attributes=attributes, start_time=began).end(now)
