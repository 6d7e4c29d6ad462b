"""OpenTelemetry, where BITMILL_OTLP_ENDPOINT is set. Else nothing is loaded that makes or sends spans, and
these functions do nothing.

    request, FastAPI's own span ── traceparent, in the job's row ──▶ attempt, in the worker
                                                                   ├── fetch, plan, compress, ...
                                                                   └── in compress: one for each layer
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from importlib.metadata import version
from typing import Any

from fastapi.telemetry import TelemetryConfig
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from api.settings import Settings

_HEADER = "traceparent"
_PROBES = frozenset({"/livez", "/readyz", "/metrics"})
_w3c = TraceContextTextMapPropagator()


class TracingRefused(Exception):
    """Tracing is on, and cannot work; the message says what to do."""


def start_tracing(settings: Settings, service: str) -> None:
    """Send this process's spans from now on, under that service name. The last ones are sent at its end.

    Raises:
        TracingRefused: the extra `otel` is not installed.
    """
    if settings.otlp_endpoint is None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TracingRefused(
            "BITMILL_OTLP_ENDPOINT is set, but OpenTelemetry's SDK is not installed. "
            "Install `bitmill[otel]`, or leave the setting out."
        ) from error
    resource = Resource.create({"service.name": service, "service.version": version("bitmill")})
    exporter = OTLPSpanExporter(endpoint=f"{settings.otlp_endpoint.rstrip('/')}/v1/traces")
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)


def request_spans() -> TelemetryConfig:
    """What FastAPI traces by itself: requests, but for those that machines make every few seconds."""
    return {
        "metrics": False,
        "logs": False,
        "operation_spans": False,
        "auto_configure": False,
        "exclude": _is_probe,
    }


def _is_probe(scope: MutableMapping[str, Any]) -> bool:
    return scope["path"] in _PROBES


def current_traceparent() -> str | None:
    """The span that this is part of, as W3C Trace Context writes it; None where there is none."""
    carrier: dict[str, str] = {}
    _w3c.inject(carrier)
    return carrier.get(_HEADER)


def context_of(traceparent: str | None) -> Context:
    """Where a span is that another process began."""
    carrier: Mapping[str, str] = {} if traceparent is None else {_HEADER: traceparent}
    return _w3c.extract(carrier, context=Context())
