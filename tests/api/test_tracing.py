"""Traces are made where somebody wants them. What they look like is in tests/integration/test_traces.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
from opentelemetry import context, trace

from api.settings import Settings
from api.tracing import TracingRefused, context_of, current_traceparent, start_tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_unless_they_are_wanted_nothing_is_loaded_for_them(tmp_path: object) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nimport worker.celery_app\nfrom api.main import create_app\n"
        "from api.settings import Settings\nfrom api.tracing import start_tracing\n"
        f"settings = Settings(data_dir=Path({str(tmp_path)!r}))\n"
        "start_tracing(settings, 'test')\ncreate_app(settings)\n"
        "sys.exit(bool({'opentelemetry.sdk.trace', 'opentelemetry.exporter'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_without_the_extra_the_wish_is_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    wanted = settings.model_copy(update={"otlp_endpoint": "http://127.0.0.1:4318"})
    with pytest.raises(TracingRefused, match=r"bitmill\[otel\]"):
        start_tracing(wanted, "test")


def test_a_span_survives_in_a_row() -> None:
    assert current_traceparent() is None
    assert not trace.get_current_span(context_of(None)).get_span_context().is_valid
    token = context.attach(context_of(PARENT))
    try:
        assert current_traceparent() == PARENT
    finally:
        context.detach(token)
