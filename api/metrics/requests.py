"""Counts and times of HTTP requests, by route. Never by path: there are as many paths as jobs."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

NO_ROUTE = "none"
_METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "PUT", "PATCH", "OPTIONS"})
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class RequestMetrics:
    """Of one application."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "bitmill_http_requests",
            "Requests that were answered.",
            ["method", "route", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "bitmill_http_request_duration_seconds",
            "From a request to the end of its answer; of a stream of events, how long somebody listened.",
            ["method", "route"],
            registry=registry,
            buckets=_SECONDS,
        )

    def observe(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """Count a request. route: the template that it matched, if any."""
        known = method if method in _METHODS else "other"
        self._requests.labels(known, route or NO_ROUTE, status).inc()
        self._seconds.labels(known, route or NO_ROUTE).observe(seconds)
