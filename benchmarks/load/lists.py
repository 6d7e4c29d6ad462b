"""GET /v1/jobs: first, middle and last pages, with and without filters, and a walk through all pages."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import httpx

from api.cursors import Position
from api.jobs.ledger import repository
from api.jobs.ledger.models import JobStatus
from api.jobs.ledger.repository import JobFilter, JobOrder
from benchmarks.console import say
from benchmarks.load.client import Times, as_fast_as_it_goes, gets
from benchmarks.load.machine import Api

REQUESTS = 300
_TENTHS = 10
_FILTERS: Mapping[str, JobFilter] = {
    "": JobFilter(),
    "status=failed": JobFilter(status=JobStatus.FAILED),
    "status=running": JobFilter(status=JobStatus.RUNNING),
    "model=/models/7": JobFilter(model="/models/7"),
    "scheme=W4A16": JobFilter(scheme="W4A16"),
    "label=team:t7": JobFilter(labels=[("team", "t7")]),
    "label=run:4711": JobFilter(labels=[("run", "4711")]),
}


async def measure(api: Api, middle: str) -> None:
    """middle: a job in the middle of the list."""
    say(f"\nGET /v1/jobs, {REQUESTS} times each, one after the other: p50 and p99, ms\n")
    say("| filter | limit | first page | middle | last page |")
    say("| --- | ---: | ---: | ---: | ---: |")
    for limit in (20, 100):
        for query, wanted in _FILTERS.items():
            cells = []
            for cursor in (None, _at(api, middle), _before_the_last(api, wanted, limit)):
                parts = [f"limit={limit}", query, f"cursor={cursor.to_cursor()}" if cursor else ""]
                target = gets(["/v1/jobs?" + "&".join(filter(None, parts))], api.key)
                times = await as_fast_as_it_goes(api.port, target, connections=1, count=REQUESTS)
                cells.append(f"{times.milliseconds(50):.1f}, {times.milliseconds(99):.1f}")
            say(f"| {query or 'none'} | {limit} | {' | '.join(cells)} |")


def walk(api: Api) -> None:
    """Every page of 100 once, in order."""
    each, params = [], {"limit": "100"}
    with httpx.Client(headers={"Authorization": f"Bearer {api.key}"}) as http:
        while True:
            began = time.perf_counter()
            page: dict[str, Any] = http.get(f"http://127.0.0.1:{api.port}/v1/jobs", params=params).json()
            each.append(time.perf_counter() - began)
            if page["next_cursor"] is None:
                break
            params["cursor"] = page["next_cursor"]
    say(f"\nAll {len(each):,} pages of 100, in order, with httpx; by tenths of the way, ms\n")
    tenths = [each[n * len(each) // _TENTHS : (n + 1) * len(each) // _TENTHS] for n in range(_TENTHS)]
    for percent in (50, 99):
        say(f"p{percent}: " + ", ".join(f"{Times(tenth).milliseconds(percent):.1f}" for tenth in tenths))


def _at(api: Api, job_id: str) -> Position:
    with api.database.read() as session:
        job = repository.get(session, api.project, job_id)
        assert job is not None
        return Position(job.created_at, job.id)


def _before_the_last(api: Api, wanted: JobFilter, limit: int) -> Position | None:
    """The place behind which the last page begins; None where the first page is the last one."""
    with api.database.read() as session:
        oldest = repository.list_page(session, api.project, wanted, JobOrder.OLDEST, None, limit + 1)
    return Position(oldest[-1].created_at, oldest[-1].id) if len(oldest) > limit else None
