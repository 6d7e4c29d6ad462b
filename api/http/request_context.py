"""What surrounds every request: its id, its log record, its metrics, and an answer whatever happens."""

from __future__ import annotations

import re
import secrets
import time

import structlog
from fastapi import Request
from opentelemetry import trace
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.http.problems import INTERNAL_MESSAGE, problem_response
from api.metrics.requests import RequestMetrics
from api.observability import HIDDEN, hide

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

log = structlog.get_logger(__name__)


def name_in_logs(request: Request) -> None:
    """Add the ids in the path (job_id, batch_id, ...) to every log record of the request."""
    ids = {name: value for name, value in request.path_params.items() if name.endswith("_id")}
    structlog.contextvars.bind_contextvars(**ids)


def _describe_span(scope: Scope, request_id: str) -> None:
    """Add the request's id to its span, and remove secrets that callers may have put into the URL."""
    span = trace.get_current_span()
    span.set_attributes({"bitmill.request_id": request_id, "url.path": hide("", scope["path"])})
    if scope.get("query_string"):
        span.set_attribute("url.query", HIDDEN)


class RequestContext:
    """ASGI middleware: a request id in every log record and answer, one record a request and its metrics,
    and a problem instead of a traceback where a route fails unexpectedly."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        _describe_span(scope, request_id)
        started = time.perf_counter()
        method, path = scope["method"], scope["path"]
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self.app(scope, receive, send_with_id)
            except Exception:
                log.exception("request_failed", method=method, path=path)
                if status:
                    raise  # the answer is under way: closing the connection is all that is left
                answer = problem_response(500, "internal_error", INTERNAL_MESSAGE)
                await answer(scope, receive, send_with_id)
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path_format", None)
            self.metrics.observe(method, route, status, seconds)
            spent = round(1000 * seconds, 1)
            log.info("request", method=method, route=route, path=path, status=status, milliseconds=spent)
