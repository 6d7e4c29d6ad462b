"""A client that costs little: connections are kept alive, requests are bytes already, and of an answer only
the length is read."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle

Target = Iterator[bytes]
"""Requests, one after the other, without end."""


class Connection(asyncio.Protocol):
    """One connection, on which one request at a time is under way. answered: called when it was answered.
    failed: told of an answer that is no success."""

    def __init__(self, answered: Callable[[Connection], None], failed: asyncio.Future[None]) -> None:
        self._answered = answered
        self._failed = failed
        self._buffer = b""
        self._whole = 0
        self.asked_at = 0.0
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def ask(self, request: bytes, at: float) -> None:
        """at: the moment from which the answer's time is counted."""
        self.asked_at = at
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._whole:
            head, end, _ = self._buffer.partition(b"\r\n\r\n")
            if not end:
                return
            length = head.lower().partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0]
            self._whole = len(head) + len(end) + int(length)
        if len(self._buffer) < self._whole:
            return
        answer, self._buffer, self._whole = self._buffer, b"", 0
        if answer.startswith(b"HTTP/1.1 20"):
            self._answered(self)
        elif not self._failed.done():
            self._failed.set_exception(RuntimeError(answer.decode()))


@dataclass
class Times:
    """Seconds that answers took, and how long all of it took."""

    each: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return len(self.each) / self.seconds

    def milliseconds(self, percent: float) -> float:
        """What so many percent of the answers took at most."""
        ordered = sorted(self.each)
        return 1000 * ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def gets(paths: list[str], key: str) -> Target:
    """GET requests for these paths in turn."""
    head = f" HTTP/1.1\r\nHost: bitmill\r\nAuthorization: Bearer {key}\r\n\r\n"
    return cycle([f"GET {path}{head}".encode() for path in paths])


async def as_fast_as_it_goes(
    port: int, target: Target, *, connections: int, seconds: float = 0, count: int = 0
) -> Times:
    """Ask on so many connections, on each as soon as it was answered, for some seconds or so many times."""
    times, over = Times(), asyncio.get_running_loop().create_future()

    def answered(connection: Connection) -> None:
        now = time.perf_counter()
        times.each.append(now - connection.asked_at)
        if len(times.each) < count or now - began < seconds:
            connection.ask(next(target), now)
        elif not over.done():
            over.set_result(None)

    opened = await _open(port, connections, answered, over)
    began = time.perf_counter()
    for connection in opened:
        connection.ask(next(target), time.perf_counter())
    await over
    times.seconds = time.perf_counter() - began
    _close(opened)
    return times


async def at_rate(port: int, target: Target, *, rate: float, seconds: float, connections: int = 100) -> Times:
    """Ask so many times a second, whether or not answers come. Their time counts from when they were due."""
    times, over = Times(), asyncio.get_running_loop().create_future()
    late, idle, total = deque[float](), deque[Connection](), int(rate * seconds)

    def answered(connection: Connection) -> None:
        times.each.append(time.perf_counter() - connection.asked_at)
        if late:
            connection.ask(next(target), late.popleft())
        else:
            idle.append(connection)
        if len(times.each) == total:
            over.set_result(None)

    opened = await _open(port, connections, answered, over)
    idle.extend(opened)
    began = time.perf_counter()
    for number in range(total):
        due = began + number / rate
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        if idle:
            idle.popleft().ask(next(target), due)
        else:
            late.append(due)
    await over
    times.seconds = time.perf_counter() - began
    _close(opened)
    return times


async def _open(
    port: int, connections: int, answered: Callable[[Connection], None], failed: asyncio.Future[None]
) -> list[Connection]:
    loop = asyncio.get_running_loop()
    made = [
        await loop.create_connection(lambda: Connection(answered, failed), "127.0.0.1", port)
        for _ in range(connections)
    ]
    return [connection for _, connection in made]


def _close(connections: list[Connection]) -> None:
    for connection in connections:
        connection.transport.abort()
