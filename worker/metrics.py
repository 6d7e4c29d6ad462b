"""Metrics of a worker, for Prometheus. The embedded server exposes them at its own /metrics, `bitmill
worker` on BITMILL_WORKER_METRICS_PORT if that is set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

from prometheus_client import Counter, Gauge, start_http_server

from api.errors import Unavailable
from api.jobs.ledger.models import AttemptOutcome
from api.settings import Settings
from compression.events import Phase

ATTEMPTS = Counter("bitmill_worker_attempts", "Attempts that ended here, by outcome.", ["outcome"])
LAYERS = Counter("bitmill_worker_layers_solved", "Layers that engines solved.")
PHASE_SECONDS = Counter("bitmill_worker_phase_seconds", "Time of attempts, by phase.", ["phase"])
UPLOADED = Counter("bitmill_worker_uploaded_bytes", "Bytes that were sent to the store.")
PEAK_MEMORY = Gauge(
    "bitmill_worker_engine_peak_memory_bytes",
    "The most memory that the engine of the last attempt used, of the host and of its GPU.",
    ["memory"],
)

for _outcome in AttemptOutcome:  # exposed as 0 before the first one
    ATTEMPTS.labels(_outcome.value)
for _phase in get_args(Phase):
    PHASE_SECONDS.labels(_phase)


@contextmanager
def exposed(settings: Settings) -> Iterator[None]:
    """Expose the metrics while the block runs, if a port is set.

    Raises:
        Unavailable: `metrics_port_unavailable`.
    """
    if settings.worker_metrics_port is None:
        yield
        return
    try:
        server, thread = start_http_server(settings.worker_metrics_port, settings.host)
    except OSError as error:
        message = f"Metrics cannot be exposed on port {settings.worker_metrics_port}: {error.strerror}."
        hint = "Set BITMILL_WORKER_METRICS_PORT to a port that is free, or leave it out."
        raise Unavailable("metrics_port_unavailable", message, hint) from error
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
