"""Readers of event streams on one process: its threads and memory, and how late they hear of an event."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from statistics import median

from api.jobs.ledger import events
from benchmarks.console import say
from benchmarks.load.machine import Api

_EVENTS = 10
_IDLE_SECONDS = 11  # a thread without work for ten seconds ends when another one has some


async def measure(api: Api, job_ids: Sequence[str], told_before: int) -> None:
    """One reader of each of these jobs' events, which have had so many each and go on."""
    heard: asyncio.Queue[float] = asyncio.Queue()
    threads, memory = [api.threads()], [api.resident_bytes()]
    async with asyncio.TaskGroup() as group:
        readers = [group.create_task(_read(api, job_id, heard)) for job_id in job_ids]
        for _ in range(told_before * len(job_ids)):
            await heard.get()
        threads.append(api.threads())
        await asyncio.sleep(_IDLE_SECONDS)
        threads.append(api.threads())
        delays = []
        for _ in range(_EVENTS):
            committed = await asyncio.to_thread(_tell, api, job_ids)
            delays += [await heard.get() - committed for _ in job_ids]
            threads.append(api.threads())
        memory.append(api.resident_bytes())
        for reader in readers:
            reader.cancel()
    say(f"\n{len(job_ids)} readers of events, of a job each\n")
    say(f"Threads of the process: {threads[0]} before, {threads[1]} when all had caught up, {threads[2]}")
    say(f"after {_IDLE_SECONDS} s without an event, at most {max(threads)} while all heard of events.")
    say(f"Memory: {memory[0] / 1e6:.0f} MB before, {memory[1] / 1e6:.0f} MB with them.")
    say(f"From a commit to a reader: median {median(delays):.3f} s, at most {max(delays):.3f} s.")


async def _read(api: Api, job_id: str, heard: asyncio.Queue[float]) -> None:
    """Put the moment of each event."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(
        f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: bitmill\r\nAccept: text/event-stream\r\n"
        f"Authorization: Bearer {api.key}\r\n\r\n".encode()
    )
    try:
        async for line in reader:
            if line.startswith(b"event: "):
                heard.put_nowait(time.perf_counter())
    finally:
        writer.close()


def _tell(api: Api, job_ids: Sequence[str]) -> float:
    """Let every job have an event, and return when that was committed."""
    with api.database.write() as session:
        for job_id in job_ids:
            events.append(session, job_id, "warning", {"code": "measured"})
    return time.perf_counter()
