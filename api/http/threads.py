"""Threads for work that takes long, so that it leaves the server's other threads to the other requests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread

P = ParamSpec("P")
T = TypeVar("T")


class ThreadLimit:
    """At most so many threads for one kind of work. Requests above that wait for a thread without having one.

    FastAPI runs a route that is not async in one of 40 threads, which all such routes share: forty that wait
    for the Hub, or for a lock, would keep everybody else waiting.
    """

    def __init__(self, threads: int) -> None:
        self._limiter = CapacityLimiter(threads)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`work(...)`, in one of these threads."""
        return await to_thread.run_sync(partial(work, *args, **kwargs), limiter=self._limiter)
