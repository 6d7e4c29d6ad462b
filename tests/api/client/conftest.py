"""Both clients, called in the same way, on a real app behind a real socket; and a server that is scripted."""

from __future__ import annotations

import asyncio
import inspect
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from api.client import AsyncClient, Client
from tests.api.conftest import Server
from tests.support.serving import serving


class InLoop:
    """An AsyncClient whose calls are run to their end, as those of a Client are by a loop of its own."""

    def __init__(self, client: AsyncClient, runner: asyncio.Runner) -> None:
        self._client = client
        self._runner = runner

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            came = getattr(self._client, name)(*args, **kwargs)
            return self._runner.run(came) if inspect.isawaitable(came) else self._items(came)

        return call

    def _items(self, items: Any) -> Iterator[Any]:
        async def following() -> Any:
            return await anext(items, None)

        try:
            while (item := self._runner.run(following())) is not None:
                yield item
        finally:
            self._runner.run(items.aclose())


Connect = Callable[..., AbstractContextManager[Any]]


@pytest.fixture(params=["blocking", "awaiting"])
def connect(request: pytest.FixtureRequest) -> Connect:
    """Makes a client of one of the two kinds, in turn."""

    @contextmanager
    def blocking(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with Client(*args, **kwargs) as client:
            yield client

    @contextmanager
    def awaiting(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with asyncio.Runner() as runner:
            client = AsyncClient(*args, **kwargs)
            try:
                yield InLoop(client, runner)
            finally:
                runner.run(client.close())

    return {"blocking": blocking, "awaiting": awaiting}[request.param]


@pytest.fixture
def database_url(migrated_file: Path, tmp_path: Path) -> str:
    """SQLite alone: what answers makes no difference to who asks."""
    return f"sqlite:///{shutil.copy(migrated_file, tmp_path / 'bitmill.db')}"


@dataclass(frozen=True)
class Served:
    """The app of the `server` behind a socket. asked: the operations that were called, method and path."""

    server: Server
    url: str
    key: str
    asked: set[tuple[str, str]]


@pytest.fixture
def served(server: Server) -> Iterator[Served]:
    asked: set[tuple[str, str]] = set()

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        await server.http.app(scope, receive, send)
        asked.add((scope["method"].lower(), scope["route"].path_format))

    with serving(noting, lifespan="off") as url:
        yield Served(server, url, server.http.headers["Authorization"].removeprefix("Bearer "), asked)


@pytest.fixture
def client(connect: Connect, served: Served) -> Iterator[Any]:
    with connect(served.url, served.key) as client:
        yield client


@dataclass(frozen=True)
class Asked:
    """A request that came. line: method and target."""

    line: str
    headers: dict[str, str]
    body: str


@dataclass
class Scripted:
    """Answers one request after the other with what is in `answers`, and closes the connection each time.

    An answer is all the bytes that are sent; none of them is a connection that breaks.
    """

    answers: list[bytes]
    asked: list[Asked] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[str]:
        """Its URL."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=self._answer_all, args=(listener,))
            thread.start()
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            thread.join(10)
            assert not thread.is_alive(), f"{len(self.answers)} answers were not asked for"

    def _answer_all(self, listener: socket.socket) -> None:
        while self.answers:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as incoming:
                line = incoming.readline().decode()
                headers = {}
                while (text := incoming.readline().decode().strip()) != "":
                    name, _, value = text.partition(": ")
                    headers[name.lower()] = value
                body = incoming.read(int(headers.get("content-length", 0))).decode()
                self.asked.append(Asked(line.rpartition(" ")[0], headers, body))
                connection.sendall(self.answers.pop(0))


def answer(status: int, body: bytes = b"", *, promised: int | None = None, **headers: str) -> bytes:
    """An answer; promised: the length that it says it has, where that is more than comes."""
    length = len(body) if promised is None else promised
    lines = [f"HTTP/1.1 {status} Said", f"Content-Length: {length}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "\r\n"]).encode() + body
