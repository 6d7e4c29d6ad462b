"""Webhooks: a project's own servers are told what happens to its jobs."""
