"""Batches: jobs that are submitted together, each accepted or refused on its own."""
