"""Jobs: submitting, following, and what can be done with them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

import httpx

from api.client.base import PAGE, Base, idempotent, in_path
from api.client.drivers import call, listing
from api.client.events import EventReader
from api.client.flows import Backoff, Flow, Item, Listing, Open, Pause, Read, Request, Send, answered
from api.client.types import (
    Estimate,
    EventRead,
    JobDetail,
    JobOverrides,
    JobPlanned,
    JobRead,
    JobStatus,
    JobSubmit,
)

TERMINAL: tuple[JobStatus, ...] = ("succeeded", "failed", "cancelled", "expired")
_LAST_EVENTS = tuple(f"job_{status}" for status in TERMINAL)
LONG_POLL_SECONDS = 30
_QUIET_SECONDS = 60.0
"""A stream says something every 15."""


class JobCalls(Base):
    """Calls below /v1/jobs."""

    @call
    def submit(self, body: JobSubmit, *, idempotency_key: str | None = None) -> Flow[JobRead]:
        """Submit a job and return it.

        The same key and body, sent again, give the same job. Each call has a key of its own unless one is
        given, so that what is sent again after a broken connection makes no second job.
        """
        return self._json(
            Request("POST", "/v1/jobs", json=body, headers=idempotent(idempotency_key), repeatable=True)
        )

    @call
    def plan(self, body: JobSubmit) -> Flow[JobPlanned]:
        """What would become of a submission; nothing is stored."""
        return self._post("/v1/jobs", body, repeatable=True, dry_run=True)

    @call
    def estimate(self, body: JobSubmit) -> Flow[Estimate]:
        """What a job would take, itemized; nothing is stored."""
        return self._post("/v1/jobs/estimate", body, repeatable=True)

    @call
    def job(self, job_id: str) -> Flow[JobDetail]:
        """A job with its plan and attempts."""
        return self._get(in_path("jobs", job_id))

    @listing
    def jobs(
        self,
        *,
        status: JobStatus | None = None,
        model: str | None = None,
        scheme: str | None = None,
        method: str | None = None,
        labels: Mapping[str, str] | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        batch: str | None = None,
        sort: Literal["created_at", "-created_at"] | None = None,
        page_size: int = PAGE,
    ) -> Listing[JobRead]:
        """All jobs that fit, the newest first unless `sort` says otherwise. labels: jobs have all of them."""
        return self._pages(
            "/v1/jobs",
            page_size,
            status=status,
            model=model,
            scheme=scheme,
            method=method,
            label=[f"{key}:{value}" for key, value in (labels or {}).items()],
            created_after=created_after and created_after.isoformat(),
            created_before=created_before and created_before.isoformat(),
            batch=batch,
            sort=sort,
        )

    @listing
    def events(self, job_id: str, *, since: int = 0, page_size: int = PAGE) -> Listing[EventRead]:
        """What has happened to a job so far, in order, after the seq `since`."""
        while True:
            page = yield from self._get(in_path("jobs", job_id, "events"), since=since, limit=page_size)
            for event in page["items"]:
                yield Item(event)
            if len(page["items"]) < page_size:
                return
            since = page["next_since"]

    @listing
    def follow(self, job_id: str, *, since: int = 0) -> Listing[EventRead]:
        """What happens to a job, as it happens, after the seq `since` and to the job's end.

        A stream that breaks is taken up behind the last event that came.
        """
        backoff = Backoff(self.retry_seconds)
        while True:
            stream = Request(
                "GET",
                in_path("jobs", job_id, "events"),
                headers={"Accept": "text/event-stream", "Last-Event-ID": str(since)},
                repeatable=True,
                waits=_QUIET_SECONDS,
            )
            response = yield from answered(Open(stream), backoff)
            if response.status_code == 204:
                return
            reader, last = EventReader(), ""
            error: httpx.TransportError = httpx.RemoteProtocolError("The stream ended before the job did.")
            try:
                while (chunk := (yield Read())) is not None:
                    for event in reader.events(chunk):
                        since, last = event["seq"], event["type"]
                        backoff.reset()
                        yield Item(event)
                if last in _LAST_EVENTS:  # and no retry came before the stream ended
                    return
            except httpx.TransportError as broken:
                error = broken
            pause = backoff.next_pause()
            if pause is None:
                raise error
            yield Pause(pause)

    @call
    def wait(self, job_id: str, *, timeout_seconds: float = math.inf) -> Flow[JobDetail]:
        """The job once it has ended. Asks by long polls.

        Raises:
            TimeoutError: it had not ended after `timeout_seconds`.
        """
        give_up = time.monotonic() + timeout_seconds
        path = in_path("jobs", job_id)
        job: JobDetail = yield from self._get(path)
        while job["status"] not in TERMINAL:
            left = give_up - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{job_id} is still {job['status']} after {timeout_seconds:g} seconds")
            seconds = math.ceil(min(left, LONG_POLL_SECONDS))
            job = yield from self._get(path, seconds, wait=seconds, since=job["event_seq"])
        return job

    @call
    def report(self, job_id: str) -> Flow[dict[str, Any]]:
        """The report of a job that has one."""
        return self._get(in_path("jobs", job_id, "report"))

    @call
    def report_csv(self, job_id: str) -> Flow[str]:
        """The modules of the report, a line of CSV each."""
        request = Request("GET", in_path("jobs", job_id, "report"), {"format": "csv"}, repeatable=True)
        response = yield from answered(Send(request), Backoff(self.retry_seconds))
        return response.text

    @call
    def cancel(self, job_id: str) -> Flow[JobRead]:
        """Cancel a job and return it."""
        return self._post(in_path("jobs", job_id, "cancel"), repeatable=True)

    @call
    def retry(self, job_id: str) -> Flow[JobRead]:
        """Queue a job again that did not succeed, and return it."""
        return self._post(in_path("jobs", job_id, "retry"))

    @call
    def clone(
        self, job_id: str, overrides: JobOverrides, *, idempotency_key: str | None = None
    ) -> Flow[JobRead]:
        """Submit a job like another, with other values for some fields. idempotency_key: as in `submit`."""
        headers = idempotent(idempotency_key)
        path = in_path("jobs", job_id, "clone")
        return self._json(Request("POST", path, json=overrides, headers=headers, repeatable=True))

    @call
    def delete(self, job_id: str) -> Flow[None]:
        """Delete a job that has ended, and its files."""
        return self._delete(in_path("jobs", job_id))
