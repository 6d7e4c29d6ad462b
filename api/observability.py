"""Logs with the ids of requests, jobs and attempts, as JSON or for people, and never with a secret."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog
from opentelemetry import trace

from api.settings import Settings

_SECRET_NAME = re.compile(r"authorization|api_key|secret|password|credential", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"bitmill_[A-Za-z0-9]{20,}|whsec_[A-Za-z0-9+/=]{20,}|hf_[A-Za-z0-9]{20,}"
    r"|(?<=://)[^/@\s]+(?=@)|(?<=X-Amz-Signature=)\w+|(?<=X-Amz-Security-Token=)[\w%.+-]+"
)
HIDDEN = "[hidden]"


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
    return {name: hide(name, value) for name, value in record.items()}


def hide(name: str, value: Any) -> Any:
    """A value of that name without secrets."""
    if isinstance(value, dict):
        return {key: hide(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [hide(name, inner) for inner in value]
    if _SECRET_NAME.search(name):
        return HIDDEN
    return _SECRET_VALUE.sub(HIDDEN, value) if isinstance(value, str) else value
