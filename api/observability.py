"""Logs with the ids of requests, jobs and attempts, as JSON or for people, and never with a secret."""

from __future__ import annotations

import logging
import re
import secrets
import sys
import time
from collections.abc import MutableMapping
from typing import Any

import structlog
from fastapi import Request
from opentelemetry import trace
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import INTERNAL_MESSAGE, problem_response
from api.metrics.requests import RequestMetrics
from api.settings import Settings

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SECRET_NAME = re.compile(r"authorization|api_key|secret|password|credential", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"bitmill_[A-Za-z0-9]{20,}|whsec_[A-Za-z0-9+/=]{20,}|hf_[A-Za-z0-9]{20,}"
    r"|(?<=://)[^/@\s]+(?=@)|(?<=X-Amz-Signature=)\w+|(?<=X-Amz-Security-Token=)[\w%.+-]+"
)
_HIDDEN = "[hidden]"

log = structlog.get_logger(__name__)


def configure_logging(settings: Settings) -> None:
    """Send structlog's and the standard library's records to stderr in one format."""
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_trace,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    console = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
    )
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer() if as_json else console
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                hide_secrets,
                renderer,
            ],
        )
    )
    logging.getLogger("kombu.connection").setLevel(logging.ERROR)  # warns that memory:// names no host
    for name in ("botocore", "s3transfer"):
        logging.getLogger(name).setLevel(logging.WARNING)  # below, they tell tokens and signatures
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())


def add_trace(_logger: Any, _method: str, record: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Name the trace that a record falls into, where traces are made."""
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        record["trace_id"] = trace.format_trace_id(span.trace_id)
    return record


def hide_secrets(_logger: Any, _method: str, record: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace API keys, webhooks' secrets, passwords in URLs and values with a telling name, at any depth."""
    return {name: _hide(name, value) for name, value in record.items()}


def _hide(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _hide(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_hide(name, inner) for inner in value]
    if _SECRET_NAME.search(name):
        return _HIDDEN
    return _SECRET_VALUE.sub(_HIDDEN, value) if isinstance(value, str) else value


def name_in_logs(request: Request) -> None:
    """Put what the path names (job_id, batch_id, ...) into every record of the request."""
    ids = {name: value for name, value in request.path_params.items() if name.endswith("_id")}
    structlog.contextvars.bind_contextvars(**ids)


def _describe_span(scope: Scope, request_id: str) -> None:
    """Add the request's id to its span, and take out what callers may have put into the URL."""
    span = trace.get_current_span()
    span.set_attributes({"bitmill.request_id": request_id, "url.path": _hide("", scope["path"])})
    if scope.get("query_string"):
        span.set_attribute("url.query", _HIDDEN)


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
