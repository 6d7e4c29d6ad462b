"""The two ways in which flows are run, and the methods that both clients have of one flow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import AsyncExitStack, ExitStack
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload
from urllib.parse import urlsplit

import httpx

from api.client.flows import Do, Flow, Item, Listing, Open, Pause, Read, Request, Send, Step

T = TypeVar("T")
P = ParamSpec("P")

TIMEOUT_SECONDS = 60.0
"""For a connection, and for bytes to come."""
RETRY_SECONDS = 60.0
"""A restart of the server, or the rest of a minute whose requests are used up."""
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Blocking:
    """Runs flows in the thread that calls."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self.retry_seconds = retry_seconds
        self._http = httpx.Client(**_options(url, api_key, timeout_seconds))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close connections."""
        self._http.close()

    def run(self, flow: Flow[T]) -> T:
        """What a flow returns."""
        (result,) = self.iterate(_as_listing(flow))
        return result

    def iterate(self, listing: Listing[T]) -> Generator[T, None, None]:
        """The items of a listing."""
        with ExitStack() as opened:
            wire = _BlockingWire(self._http, opened)
            came = _Came()
            while (step := came.next_step(listing)) is not None:
                came = _Came()
                if isinstance(step, Item):
                    yield step.value
                else:
                    with came:
                        came.value = wire.perform(step)


class Awaiting:
    """Runs flows in the event loop (asyncio); files are read and written in threads."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self.retry_seconds = retry_seconds
        self._http = httpx.AsyncClient(**_options(url, api_key, timeout_seconds))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close connections."""
        await self._http.aclose()

    async def run(self, flow: Flow[T]) -> T:
        """What a flow returns."""
        (result,) = [item async for item in self.iterate(_as_listing(flow))]
        return result

    async def iterate(self, listing: Listing[T]) -> AsyncGenerator[T, None]:
        """The items of a listing."""
        async with AsyncExitStack() as opened:
            wire = _AwaitingWire(self._http, opened)
            came = _Came()
            while (step := came.next_step(listing)) is not None:
                came = _Came()
                if isinstance(step, Item):
                    yield step.value
                else:
                    with came:
                        came.value = await wire.perform(step)


class _Came:
    """What came of a step: a value, or the exception that its block raised."""

    def __init__(self) -> None:
        self.value: Any = None
        self._error: Exception | None = None

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, Exception):
            self._error = error
        return self._error is not None

    def next_step(self, listing: Listing[T]) -> Step | Item[T] | None:
        """Give it to the listing. Its next step, None behind the last."""
        try:
            return listing.send(self.value) if self._error is None else listing.throw(self._error)
        except StopIteration:
            return None


class _BlockingWire:
    """Performs the steps of one flow, of which one response at a time is open."""

    def __init__(self, http: httpx.Client, opened: ExitStack) -> None:
        self._http = http
        self._opened = opened
        self._chunks: Iterator[bytes] = iter(())

    def perform(self, step: Step) -> Any:
        match step:
            case Send(request):
                return self._http.send(_built(self._http, request))
            case Open(request):
                self._opened.close()
                response = self._http.send(_built(self._http, request), stream=True, follow_redirects=True)
                self._opened.callback(response.close)
                if response.is_error:
                    response.read()
                self._chunks = response.iter_bytes()
                return response
            case Read():
                return next(self._chunks, None)
            case Do(work):
                return work()
            case Pause(seconds):
                return time.sleep(seconds)


class _AwaitingWire:
    """Performs the steps of one flow, of which one response at a time is open."""

    def __init__(self, http: httpx.AsyncClient, opened: AsyncExitStack) -> None:
        self._http = http
        self._opened = opened
        self._chunks: AsyncIterator[bytes]

    async def perform(self, step: Step) -> Any:
        match step:
            case Send(request):
                return await self._http.send(_built(self._http, request))
            case Open(request):
                await self._opened.aclose()
                response = await self._http.send(
                    _built(self._http, request), stream=True, follow_redirects=True
                )
                self._opened.push_async_callback(response.aclose)
                if response.is_error:
                    await response.aread()
                self._chunks = response.aiter_bytes()
                return response
            case Read():
                return await anext(self._chunks, None)
            case Do(work):
                return await asyncio.to_thread(work)
            case Pause(seconds):
                return await asyncio.sleep(seconds)


class call(Generic[P, T]):
    """A method of both clients: Client's returns what the flow returns, AsyncClient's is awaited for it."""

    def __init__(self, flow: Callable[Concatenate[Any, P], Flow[T]]) -> None:
        self._flow = flow

    @overload
    def __get__(self, client: Blocking, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: Awaiting, owner: type) -> Callable[P, Awaitable[T]]: ...
    @overload
    def __get__(self, client: None, owner: type) -> Callable[Concatenate[Any, P], Flow[T]]: ...

    def __get__(self, client: Blocking | Awaiting | None, owner: type) -> Any:
        return self._flow if client is None else _bound(client, client.run, self._flow)


class listing(Generic[P, T]):
    """A method of both clients: Client's gives an iterator, AsyncClient's an asynchronous one."""

    def __init__(self, items: Callable[Concatenate[Any, P], Listing[T]]) -> None:
        self._items = items

    @overload
    def __get__(self, client: Blocking, owner: type) -> Callable[P, Generator[T, None, None]]: ...
    @overload
    def __get__(self, client: Awaiting, owner: type) -> Callable[P, AsyncGenerator[T, None]]: ...
    @overload
    def __get__(self, client: None, owner: type) -> Callable[Concatenate[Any, P], Listing[T]]: ...

    def __get__(self, client: Blocking | Awaiting | None, owner: type) -> Any:
        return self._items if client is None else _bound(client, client.iterate, self._items)


def _bound(client: Any, run: Callable[[Any], Any], make: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(make)
    def method(*args: Any, **kwargs: Any) -> Any:
        return run(make(client, *args, **kwargs))

    return method


def _as_listing(flow: Flow[T]) -> Listing[T]:
    yield Item((yield from flow))


def _options(url: str, api_key: str | None, timeout_seconds: float) -> dict[str, Any]:
    return {
        "base_url": url,
        "headers": {} if api_key is None else {"Authorization": f"Bearer {api_key}"},
        "timeout": timeout_seconds,
        "trust_env": urlsplit(url).hostname not in _LOOPBACK,
    }


def _built(http: httpx.Client | httpx.AsyncClient, request: Request) -> httpx.Request:
    seconds = http.timeout.read
    assert seconds is not None
    return http.build_request(
        request.method,
        request.path,
        params={name: value for name, value in request.params.items() if value is not None},
        headers=dict(request.headers),
        json=request.json,
        content=request.content,
        timeout=seconds + request.waits,
    )
