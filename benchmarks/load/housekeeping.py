"""What workers do beside their jobs, with many jobs in the database: how long it takes, and for how long it
writes at a time, which on SQLite others wait for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import event, text
from sqlalchemy.engine import Connection

import migrations
from api import database as clock
from api.database import Database
from api.projects.models import Project
from api.settings import Settings
from benchmarks.console import say
from benchmarks.load.client import at_rate, gets
from benchmarks.load.machine import Api
from tests.support.jobs import job_id, multiply, new_job, new_plan
from worker.context import WorkerContext
from worker.housekeeping import Reaper, delete_expired, remove_deleted, sweep


def _first(count: int) -> str:
    return f"jobs.id BETWEEN '{job_id(1)}' AND '{job_id(count)}'"


_TO_DO = (
    f"UPDATE jobs SET queue_deadline = created_at WHERE status = 'queued' AND {_first(25_000)}",
    f"UPDATE jobs SET lease_until = created_at WHERE status = 'running' AND {_first(25_000)}",
    f"UPDATE jobs SET deleted_at = created_at WHERE status = 'failed' AND {_first(1500)}",
    "INSERT INTO job_layers"
    " (job_id, work_key, layer, fingerprint, attempt, store_key, sha256, size, entry, at)"
    " SELECT job_id, 'w', seq, 'f', 1, 'k', 's', 1, '{}', created_at FROM jobs JOIN job_events"
    f" ON job_id = jobs.id WHERE status = 'succeeded' AND {_first(500)}",
    "INSERT INTO idempotency_keys (project_id, route, key, body_sha256, resource_id, created_at)"
    f" SELECT project_id, 'POST /v1/jobs', id, 's', id, created_at FROM jobs WHERE {_first(25_000)}",
    "INSERT INTO webhooks (id, project_id, url, events, all_jobs, secret, created_at)"
    " SELECT 'wh', id, 'https://example.com/', '[]', true, 's', created_at FROM projects",
    "INSERT INTO webhook_deliveries (id, webhook_id, job_id, event, body, status, attempts, created_at)"
    " SELECT 'msg_' || id, 'wh', id, 'job_succeeded', '{}', 'delivered', 1, created_at FROM jobs"
    f" WHERE status = 'succeeded' AND {_first(25_000)}",
)
"""500 waits and 250 leases run out, 105 jobs were deleted, 450 keep layers; 25,000 keys and 22,500 messages
are old."""
_LEASE_SECONDS = 0.1  # for so long a reaper looks on before it ends anything
_PAUSE_SECONDS = 0.1  # between rounds beside requests; workers make two seconds or more


@dataclass
class _Writes:
    """Transactions that write: how many, and the seconds of the longest."""

    count: int = 0
    longest: float = 0.0


def measure(database: Database, folder: Path) -> None:
    """A round that finds nothing to do, one that finds much, and one after it."""
    name = database.engine.dialect.name
    say(f"\nHousekeeping on {name}: seconds; transactions that write, and the longest of them\n")
    say("| | nothing to do | much to do | done |")
    say("| --- | ---: | ---: | ---: |")
    worker = _worker(folder, database)
    actions = _actions(worker)
    first = {what: _timed(worker, action) for what, action in actions.items()}
    with database.write() as session:
        for statement in _TO_DO:
            session.execute(text(statement))
    rounds = [first]
    rounds += [{what: _timed(worker, action) for what, action in actions.items()} for _ in range(2)]
    for what in actions:
        say(f"| {what} | {' | '.join(each[what] for each in rounds)} |")
    worker.close()


async def beside_requests(api: Api, folder: Path, job_ids: list[str], rate: float) -> None:
    """GETs while housekeeping goes on, on the other core, twenty times as often as workers do it."""
    worker = _worker(folder, api.database)
    actions = _actions(worker)
    over = False

    def keep_house() -> int:
        rounds = 0
        while not over:
            for action in actions.values():
                action()
            rounds += 1
            time.sleep(_PAUSE_SECONDS)
        return rounds

    target = gets([f"/v1/jobs/{job_id}" for job_id in job_ids], api.key)
    alone = await at_rate(api.port, target, rate=rate, seconds=4)
    keeping = asyncio.create_task(asyncio.to_thread(keep_house))
    beside = await at_rate(api.port, target, rate=rate, seconds=4)
    over = True
    rounds = await keeping
    worker.close()
    say(f"\n{rate:.0f} GETs a second: p99 {alone.milliseconds(99):.1f} ms alone,")
    say(f"{beside.milliseconds(99):.1f} ms beside {rounds} rounds of housekeeping.")


def filled_sqlite(folder: Path, jobs: int) -> Database:
    """A database of as many jobs and events."""
    url = f"sqlite:///{folder / 'bitmill.db'}"
    migrations.upgrade(url)
    database = Database(url)
    with database.write() as session:
        now = clock.now(session)
        session.add_all([Project(id="p", name="p", created_at=now), new_plan()])
        session.flush()
        session.add(new_job("job", now))
        session.flush()
        multiply(session, "job", jobs)
    return database


def _worker(folder: Path, database: Database) -> WorkerContext:
    url = database.engine.url.render_as_string(hide_password=False)
    return WorkerContext.open(
        Settings(
            data_dir=folder,
            database_url=url,
            device="cpu",
            lease_seconds=_LEASE_SECONDS,
            heartbeat_seconds=_LEASE_SECONDS / 2,
        )
    )


def _actions(worker: WorkerContext) -> dict[str, Callable[[], None]]:
    """What a worker's threads do, by what it is; its reaper has known the database for a lease."""
    reaper = Reaper(worker)
    reaper.reap()
    time.sleep(2 * _LEASE_SECONDS)
    return {
        "reap": reaper.reap,
        "sweep": lambda: sweep(worker),
        "forget what is old": lambda: delete_expired(worker),
        "remove what was deleted": lambda: remove_deleted(worker.database, worker.store),
    }


def _timed(worker: WorkerContext, action: Callable[[], None]) -> str:
    with _watched(worker.database) as writes:
        began = time.perf_counter()
        action()
        seconds = time.perf_counter() - began
    return f"{seconds:.3f}; {writes.count}, {writes.longest:.3f}"


@contextmanager
def _watched(database: Database) -> Iterator[_Writes]:
    writes, begun = _Writes(), {}

    def begin(connection: Connection) -> None:
        if connection.get_execution_options().get("immediate"):
            begun[connection] = time.perf_counter()

    def commit(connection: Connection) -> None:
        if connection in begun:
            writes.count += 1
            writes.longest = max(writes.longest, time.perf_counter() - begun.pop(connection))

    listeners: dict[str, Any] = {"begin": begin, "commit": commit}
    for name, listener in listeners.items():
        event.listen(database.engine, name, listener)
    try:
        yield writes
    finally:
        for name, listener in listeners.items():
            event.remove(database.engine, name, listener)
