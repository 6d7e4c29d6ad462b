"""Metrics for Prometheus: requests of this process, and from the database what all processes share."""
