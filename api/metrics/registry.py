"""All metrics of one application."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, disable_created_metrics

from api.database import Database
from api.metrics.collector import ServiceCollector

disable_created_metrics()  # a time beside every counter and histogram, which nobody asks for


def make_registry(database: Database, lease_seconds: float) -> CollectorRegistry:
    """Metrics from the database, and of this process: memory, CPU and, in the embedded mode, the worker's.
    Those of requests are registered by RequestMetrics."""
    registry = CollectorRegistry()
    registry.register(REGISTRY)
    registry.register(ServiceCollector(database, lease_seconds))
    return registry
