"""Webhooks: messages to a project's own servers about what happens to its jobs."""
