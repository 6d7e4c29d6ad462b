"""Waiting for a job to change: one task of the process asks the database for all that wait.

    long poll ─┐                      every poll_seconds, one query for all jobs that
    stream    ─┼─▶ JobWatch.changed ◀── anybody waits for: SELECT id, event_seq ... IN (...)
    stream    ─┘

Every change of a job that is worth showing takes a seq of its own, so that it grew is all there is to know.
Nothing is kept between queries, and a waiting request holds neither a thread nor a connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass

import structlog
from starlette.concurrency import run_in_threadpool

from api.database import AWAY, Database, reason
from api.jobs.ledger import repository

POLL_SECONDS = 0.25

ReadSeqs = Callable[[Sequence[str]], Mapping[str, int]]
"""Ids of jobs -> the seq of the last event of each that exists. Runs in a thread."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class _Waiter:
    since: int
    changed: asyncio.Event


class JobWatch:
    """To be used from one event loop."""

    def __init__(self, read: ReadSeqs, *, poll_seconds: float = POLL_SECONDS) -> None:
        self._read = read
        self._poll_seconds = poll_seconds
        self._waiting: dict[str, set[_Waiter]] = {}
        self._task: asyncio.Task[None] | None = None

    async def changed(self, job_id: str, since: int, seconds: float) -> bool:
        """Whether a job gets, or has, an event after seq `since` before that time is over; a job that is gone
        has changed."""
        waiter = _Waiter(since, asyncio.Event())
        self._waiting.setdefault(job_id, set()).add(waiter)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._watch(), context=Context())  # of no one request
        try:
            async with asyncio.timeout(seconds):
                await waiter.changed.wait()
        except TimeoutError:
            return False
        finally:
            self._waiting[job_id].discard(waiter)
            if not self._waiting[job_id]:
                del self._waiting[job_id]
        return True

    async def _watch(self) -> None:
        while self._waiting:
            asked = list(self._waiting)
            try:
                seqs = await run_in_threadpool(self._read, asked)
            except AWAY as error:  # those who wait go on waiting until it answers again
                log.warning("watch_failed", error=reason(error))
            else:
                self._wake(asked, seqs)
            await asyncio.sleep(self._poll_seconds)

    def _wake(self, asked: Iterable[str], seqs: Mapping[str, int]) -> None:
        """Only waiters for jobs that were asked for: those who came during the query are woken by the next
        one."""
        for job_id in asked:
            seq = seqs.get(job_id)
            for waiter in self._waiting.get(job_id, ()):
                if seq is None or seq > waiter.since:
                    waiter.changed.set()


def seqs_in(database: Database) -> ReadSeqs:
    """Reads them from there."""

    def read(job_ids: Sequence[str]) -> Mapping[str, int]:
        with database.look() as session:
            return repository.event_seqs(session, job_ids)

    return read
