"""Limits of a request: the size of its body, and the headers that show its project's rate limit."""

from __future__ import annotations

from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.http.problems import problem_response


@dataclass
class RequestLimits:
    """Of one request, in `request.state.limits`.

    received: bytes of its body so far. headers: for its answer, whatever that will be.
    """

    max_body_bytes: int
    received: int = 0
    headers: dict[str, str] = field(default_factory=dict)

    def receive(self, size: int) -> None:
        """Count bytes of the body; 413 when there are too many."""
        self.received += size
        if self.received > self.max_body_bytes:
            raise HTTPException(413, _too_large(self.max_body_bytes), {"Connection": "close"})

    def set_max_body_bytes(self, max_bytes: int) -> None:
        """Apply the project's own limit, also to what was received before the key was looked up."""
        self.max_body_bytes = max_bytes
        self.receive(0)


class LimitRequests:
    """ASGI middleware: 413 for a body over its limit, by its Content-Length or as it arrives; and the rate
    limit's headers in the answer."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > self.max_body_bytes:
            message = _too_large(self.max_body_bytes)
            answer = problem_response(413, "body_too_large", message, headers={"Connection": "close"})
            await answer(scope, receive, send)
            return
        limits = RequestLimits(self.max_body_bytes)
        scope.setdefault("state", {})["limits"] = limits

        async def receive_bounded() -> Message:
            part = await receive()
            limits.receive(len(part.get("body", b"")))
            return part

        async def send_with_headers(message: Message) -> None:
            if limits.headers and message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(limits.headers)
            await send(message)

        await self.app(scope, receive_bounded, send_with_headers)


def _too_large(max_bytes: int) -> str:
    return f"The body is larger than {max_bytes} bytes."
