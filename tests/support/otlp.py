"""A collector of OpenTelemetry's spans: a small HTTP server on this machine that remembers what it got."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    """One finished span. parent: "" for the first of a trace; links: (trace, span) of each."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    links: list[tuple[str, str]]
    start: int
    end: int
    attributes: dict[str, Any]
    failed: bool


class Collector:
    """The running server."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.spans: list[Span] = []
        self.paths: set[str] = set()

    def add(self, path: str, body: bytes) -> None:
        self.paths.add(path)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = _attributes(resource.resource)["service.name"]
            self.spans += [_span(service, each) for scope in resource.scope_spans for each in scope.spans]

    def named(self, name: str, **attributes: Any) -> list[Span]:
        """Spans of that name, in the order in which they began, with these attributes."""
        found = [span for span in self.spans if span.name == name]
        found = [span for span in found if attributes.items() <= span.attributes.items()]
        return sorted(found, key=lambda span: span.start)


@contextmanager
def running_collector() -> Iterator[Collector]:
    server = _Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.collector = Collector(self.server_port)


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, _Server)
        self.server.collector.add(self.path, self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_arguments: Any) -> None:
        """Say nothing."""


def _span(service: str, each: Any) -> Span:
    return Span(
        service=service,
        name=each.name,
        trace=each.trace_id.hex(),
        id=each.span_id.hex(),
        parent=each.parent_span_id.hex(),
        links=[(link.trace_id.hex(), link.span_id.hex()) for link in each.links],
        start=each.start_time_unix_nano,
        end=each.end_time_unix_nano,
        attributes=_attributes(each),
        failed=each.status.code == each.status.STATUS_CODE_ERROR,
    )


def _attributes(of: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in of.attributes}
