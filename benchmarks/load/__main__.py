"""How fast the API answers, with 200,000 jobs and a million events in PostgreSQL.

    python -m benchmarks.load
    python -m benchmarks.load --only reads lists

Takes five minutes on two cores, and nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

import httpx
from sqlalchemy import func, select

from api.jobs.ledger.models import Job, JobEvent
from api.jobs.queue import leases
from api.jobs.queue.workers import WorkerIdentity
from benchmarks.console import say
from benchmarks.load import batches, housekeeping, lists, reads, submitters, watchers
from benchmarks.load.machine import Api, running, running_on_sqlite
from tests.compression.fake_checkpoints import LLAMA_3_8B, TINY, fake_llama
from tests.support.jobs import job_id, multiply

JOBS, EVENTS_EACH = 200_000, 5
RUNNING = [job_id(number) for number in range(99, 10_000, 100)]
WORKER = WorkerIdentity("measured", "cpu", 1 << 45, 0)
PARTS = ("reads", "lists", "batches", "submitters", "watchers", "housekeeping")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how fast the API answers.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory(prefix="load-") as folder, running(Path(folder)) as api:
        large = _submit(api, fake_llama(api.root / "large", LLAMA_3_8B))
        small = _submit(api, fake_llama(api.root / "small", TINY))
        _fill(api, small)
        asyncio.run(_measure(api, Path(folder), large, only))
        if "submitters" in only:
            submitters.measure(api, api.root / "small", large)
    if "submitters" in only:
        with tempfile.TemporaryDirectory(prefix="load-") as folder, running_on_sqlite(Path(folder)) as api:
            model = fake_llama(api.root / "small", TINY)
            submitters.measure(api, model, _submit(api, model))


async def _measure(api: Api, folder: Path, large: str, only: list[str]) -> None:
    if "reads" in only:
        await reads.measure(api, "jobs that run, without a plan to speak of", RUNNING)
        await reads.measure(api, "a job that runs, of a model of 32 layers", [large])
    if "lists" in only:
        await lists.measure(api, job_id(JOBS // 2))
        lists.walk(api)
    if "batches" in only:
        say("")
        batches.measure(api, "two layers", TINY)
        batches.measure(api, "32 layers", LLAMA_3_8B)
    if "watchers" in only:
        await watchers.measure(api, RUNNING, EVENTS_EACH)
    if "housekeeping" in only:
        housekeeping.measure(api.database, folder / "worker")
        await housekeeping.beside_requests(api, folder / "worker", RUNNING, rate=200)
        (folder / "sqlite").mkdir()
        database = housekeeping.filled_sqlite(folder / "sqlite", JOBS)
        housekeeping.measure(database, folder / "sqlite")
        database.close()


def _submit(api: Api, model: Path) -> str:
    """A job that a worker has taken."""
    answer = httpx.post(
        f"http://127.0.0.1:{api.port}/v1/jobs",
        json={"model": str(model), "scheme": "W4A16"},
        headers={"Authorization": f"Bearer {api.key}"},
    )
    assert answer.status_code == 202, answer.text
    with api.database.write() as session:
        claimed = leases.claim(session, WORKER, lease_seconds=86_400)
    assert claimed is not None
    return claimed[0].job_id


def _fill(api: Api, original: str) -> None:
    began = time.perf_counter()
    with api.database.write() as session:
        multiply(session, original, JOBS, events_each=EVENTS_EACH)
    with api.database.read() as session:
        jobs, events = (session.scalar(select(func.count()).select_from(of)) for of in (Job, JobEvent))
    say(f"{jobs:,} jobs and {events:,} events after {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
