"""A client of the HTTP API, with and without asyncio: for the CLI, the tests and users' own programs.

    with Client("http://127.0.0.1:8080", key) as client:
        job = client.submit({"model": "/models/llama", "dataset": "/data/texts.jsonl", "scheme": "W4A16"})
        job = client.wait(job["id"])

    async with AsyncClient("http://127.0.0.1:8080", key) as client:
        async for event in client.follow(job["id"]):
            print(event["type"])

Answers are the API's JSON as it is, dicts of the types in `api.client.types`. docs/client.md has all of it.
"""

from __future__ import annotations

from api.client.artifacts import ArtifactCalls
from api.client.drivers import Awaiting, Blocking
from api.client.errors import ApiError, DigestMismatch
from api.client.jobs import TERMINAL, JobCalls
from api.client.others import BatchCalls, ProjectCalls, ServerCalls, WebhookCalls

__all__ = ["TERMINAL", "ApiError", "AsyncClient", "Client", "DigestMismatch"]


class Calls(JobCalls, ArtifactCalls, BatchCalls, WebhookCalls, ProjectCalls, ServerCalls):
    """Every call that there is."""


class Client(Calls, Blocking):
    """Talks to one server with one API key.

    A call that gets no connection or loses it, or is told to come again (429, 503 with Retry-After), is made
    again while its pauses fit into `retry_seconds`, if that is safe. Then it raises ApiError where the
    server answers with an error, and httpx.TransportError where it does not answer. Proxies of the
    environment are used, but not for a server on this machine.
    """


class AsyncClient(Calls, Awaiting):
    """The same for asyncio: what Client returns is awaited, and its lists are read with `async for`."""
