"""Requests that have a connection while their answer is made: none may, or its locks are kept meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import fastapi.routing
import structlog
from fastapi import FastAPI
from sqlalchemy import event
from sqlalchemy.engine import Engine
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_REQUEST = "of_request"


class _Connections:
    """How many connections each request has."""

    def __init__(self, engine: Engine) -> None:
        self._mutex = threading.Lock()
        self._held: dict[str, int] = {}
        event.listen(engine, "checkout", self._taken)
        event.listen(engine, "checkin", self._given_back)

    def are_held(self) -> bool:
        """Whether the request that this is called in has one."""
        return self._held.get(_request_id(), 0) > 0

    def _taken(self, _connection: Any, record: Any, _proxy: Any) -> None:
        record.info[_REQUEST] = _request_id()
        self._count(record.info[_REQUEST], 1)

    def _given_back(self, _connection: Any, record: Any) -> None:
        self._count(record.info.pop(_REQUEST, ""), -1)

    def _count(self, request_id: str, by: int) -> None:
        if request_id:
            with self._mutex:
                self._held[request_id] = self._held.get(request_id, 0) + by


def _request_id() -> str:
    return str(structlog.contextvars.get_contextvars().get("request_id", ""))


@contextmanager
def kept_while_answering(app: FastAPI) -> Iterator[list[str]]:
    """Requests of this app that had a connection when their answer was validated, or begun to be sent. Comes
    before the app serves."""
    connections, found = _Connections(app.state.context.database.engine), list[str]()
    serialize = fastapi.routing.serialize_response

    async def serialize_checked(**arguments: Any) -> Any:
        if connections.are_held():
            found.append(f"while it was validated: {arguments['endpoint_ctx']}")
        return await serialize(**arguments)

    class Check:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def send_checked(message: Message) -> None:
                if message["type"] == "http.response.start" and connections.are_held():
                    found.append(f"while it was sent: {scope['method']} {scope['path']}")
                await send(message)

            await self.app(scope, receive, send_checked)

    app.add_middleware(Check)
    with patch.object(fastapi.routing, "serialize_response", serialize_checked):
        yield found
