"""Many who submit at the same moment, and three who ask for other things meanwhile."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

LIMIT_SECONDS = 30.0
"""After which what has no answer is counted as unanswered."""
UNANSWERED = 0


@dataclass
class Seen:
    """What came of it. statuses: of the submissions, with UNANSWERED among them. seconds: until the last one
    was answered. others: path -> the status and the seconds of every answer meanwhile."""

    statuses: Counter[int] = field(default_factory=Counter)
    submitted: list[float] = field(default_factory=list)
    seconds: float = 0.0
    others: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def slowest(self, path: str) -> float:
        """Seconds of the slowest answer to this path."""
        return max(seconds for _, seconds in self.others[path])


def submit_at_once(
    url: str, key: str, bodies: Sequence[Mapping[str, Any]], others: Sequence[str], *, path: str = "/v1/jobs"
) -> Seen:
    """Send every body on a connection of its own at the same moment, and ask for the others again and again
    until all are answered."""
    return asyncio.run(_drive(url, key, path, bodies, others))


async def _drive(
    url: str, key: str, path: str, bodies: Sequence[Mapping[str, Any]], others: Sequence[str]
) -> Seen:
    address = urlsplit(url)
    seen, over = Seen(others={path: [] for path in others}), asyncio.Event()

    async def ask(method: str, path: str, body: bytes) -> tuple[int, float]:
        began = time.perf_counter()
        try:
            async with asyncio.timeout(LIMIT_SECONDS):
                reader, writer = await asyncio.open_connection(address.hostname, address.port)
                head = f"{method} {path} HTTP/1.1\r\nHost: bitmill\r\nConnection: close\r\n"
                head += f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\n"
                writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                answer = await reader.read()
                writer.close()
        except TimeoutError:
            return UNANSWERED, LIMIT_SECONDS
        return int(answer.split(b" ", 2)[1]), time.perf_counter() - began

    async def submit(body: Mapping[str, Any]) -> None:
        status, seconds = await ask("POST", path, json.dumps(body).encode())
        seen.statuses[status] += 1
        seen.submitted.append(seconds)

    async def watch(path: str) -> None:
        while not over.is_set():
            seen.others[path].append(await ask("GET", path, b""))
            await asyncio.sleep(0.05)

    watching = [asyncio.create_task(watch(path)) for path in others]
    began = time.perf_counter()
    await asyncio.gather(*map(submit, bodies))
    seen.seconds = time.perf_counter() - began
    over.set()
    await asyncio.gather(*watching)
    return seen
