"""Following a job without asking again and again: a request that waits, and a stream of events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, Query, Request
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from api.errors import NotFound
from api.http.dependencies import Access, Accessing, AppContext
from api.jobs import service
from api.jobs.ledger import repository
from api.jobs.ledger.models import TERMINAL
from api.jobs.schemas import EventPage
from api.security import Scope

KEEP_ALIVE_SECONDS = 15.0
"""A comment is sent this often, so that nothing between closes the connection."""
_PAGE = 100

Wait = Annotated[
    int,
    Query(ge=0, le=60, description="Wait as many seconds for an event after `since`, if the job goes on."),
]
Since = Annotated[int, Query(ge=0, le=2**31 - 1, description="The seq of the last event that is known.")]


async def wait_for_change(request: Request, access: Accessing, wait: Wait = 0, since: Since = 0) -> Access:
    """Let the request go on when the job has an event after `since`, has ended, or time is over."""
    job_id = request.path_params["job_id"]

    def goes_on() -> bool:
        with access.context.database.look() as session:
            caller = access.caller(session, Scope.READ)
            version = repository.version(session, caller.project_id, job_id)
        return version is not None and version.status not in TERMINAL

    if wait and await run_in_threadpool(goes_on):
        await access.context.watch.changed(job_id, since, wait)
    return access


Waiting = Annotated[Access, Depends(wait_for_change)]


async def event_stream(context: AppContext, project_id: str, job_id: str, since: int) -> AsyncIterator[bytes]:
    """A job's events after `since` as Server-Sent Events, to the last one of a job that has ended."""

    def read() -> EventPage:
        with context.database.read() as session:
            return service.list_events(session, project_id, job_id, since, _PAGE)

    while True:
        try:
            page = await run_in_threadpool(read)
        except NotFound:  # deleted meanwhile
            return
        for event in page.items:
            yield format_sse_event(id=str(event.seq), event=event.type, data_str=event.model_dump_json())
        since = page.next_since
        if page.items:
            continue
        if page.status in TERMINAL:
            return
        if not await context.watch.changed(job_id, since, KEEP_ALIVE_SECONDS):
            yield format_sse_event(comment="still here")
