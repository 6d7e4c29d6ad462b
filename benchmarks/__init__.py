"""Reproducible measurements; README.md states workload, machine, peer and every run."""
